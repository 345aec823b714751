"""The picture of memory by kind over one step."""

from __future__ import annotations

import itertools
from typing import Any

from remat.report.drawing import Chart, fixed_scale, inline_data, literal, svg_text
from remat.report.palette import KINDS, css_colour
from remat.runs.records import Variant
from remat.units import MIB, format_bytes


def timeline_picture(variant: Variant, *, top_bytes: int, width: int, height: int) -> str:
    """Draw memory by kind over the variant's simulated step, with its budget as a line."""
    import altair as alt

    rows = [
        {
            "moment": moment,
            "kind": kind,
            "order": KINDS.index(kind) if kind in KINDS else len(KINDS),
            "mib": sample.bytes_by_kind[kind] / MIB,
            "colour": css_colour(f"kind-{kind}" if kind in KINDS else "kind-temporaries"),
        }
        for moment, sample in enumerate(variant.timeline)
        for kind in sample.bytes_by_kind
    ]
    last = max(len(variant.timeline) - 1, 1)
    top = top_bytes / MIB * 1.16  # room for the names of the phases
    x = alt.X("moment:Q", title=None, axis=None, scale=fixed_scale((0, last)))
    y_scale = fixed_scale((0, top))
    y = alt.Y("mib:Q", title="MiB", stack="zero", scale=y_scale)
    area = (
        alt.Chart(inline_data(rows))
        .mark_area(interpolate="step", line=False)
        .encode(x=x, y=y, color=literal(alt.Color, "colour"), order="order:Q", detail="kind:N")
    )
    layers = [area, *_phase_marks(variant, x, y_scale, top, last, width)]
    if variant.budget_bytes:
        layers += _budget_line(variant.budget_bytes, y_scale, width)
    name = f"timeline-{variant.label}"
    return svg_text(alt.layer(*layers).properties(width=width, height=height), name, width)


def _phase_marks(
    variant: Variant, x: Any, y_scale: Any, top: float, last: int, width: int
) -> list[Chart]:
    """Separate forward, backward and optimizer; name those that are wide enough for their name."""
    import altair as alt

    phases = [
        (phase, [moment for moment, _ in group])
        for phase, group in itertools.groupby(
            enumerate(variant.timeline), key=lambda pair: pair[1].phase
        )
    ]
    starts = [{"moment": moments[0]} for _, moments in phases[1:]]
    names = [
        {"moment": (moments[0] + moments[-1]) / 2, "phase": phase, "mib": top}
        for phase, moments in phases
        if len(moments) / last * width > 6.2 * len(phase)
    ]
    rules = (
        alt.Chart(inline_data(starts))
        .mark_rule(color="currentColor", opacity=0.35, strokeDash=[1, 3])
        .encode(x=x)
    )
    texts = (
        alt.Chart(inline_data(names))
        .mark_text(baseline="top", dy=3, fontSize=11, color="currentColor", opacity=0.75)
        .encode(x=x, y=alt.Y("mib:Q", scale=y_scale), text="phase:N")
    )
    return [*([rules] if starts else []), *([texts] if names else [])]


def _budget_line(budget_bytes: int, y_scale: Any, width: int) -> list[Chart]:
    import altair as alt

    row = [{"mib": budget_bytes / MIB, "text": f"budget {format_bytes(budget_bytes)}"}]
    y = alt.Y("mib:Q", scale=y_scale)
    base = alt.Chart(inline_data(row))
    return [
        base.mark_rule(color=css_colour("budget"), strokeWidth=1.8, strokeDash=[6, 3]).encode(y=y),
        base.mark_text(
            align="right",
            baseline="bottom",
            dy=-3,
            fontSize=11,
            fontWeight=600,
            color=css_colour("budget"),
        ).encode(x=alt.value(width - 4), y=y, text="text:N"),
    ]
