"""The picture of memory against time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from remat.report.drawing import Chart, Row, fixed_scale, inline_data, literal, svg_text
from remat.report.labels import Point, place_labels
from remat.report.palette import css_colour, variant_roles
from remat.runs.records import Run, Variant, VariantKind
from remat.units import MIB

_SHAPES = {
    VariantKind.REFERENCE: "diamond",
    VariantKind.POLICY: "square",
    VariantKind.PLANNED: "circle",
}


def pareto_picture(run: Run, *, width: int, height: int) -> str:
    """Draw measured peak against step time: plans as circles, policies as squares, front dashed."""
    import altair as alt

    shown = [v for v in run.variants if v.measured_peak_bytes and v.step_times is not None]
    roles = variant_roles(run.variants)
    points = [_row(variant, roles[variant.label]) for variant in shown]
    front = [
        {"peak": point.peak_bytes / MIB, "ms": point.step_seconds * 1e3, "order": order}
        for order, point in enumerate(run.front)
    ]
    x_domain = _padded([row["peak"] for row in (*points, *front)])
    y_domain = _padded(
        [row[key] for row in points for key in ("low", "high")] + [row["ms"] for row in front]
    )
    x = alt.X("peak:Q", title="Peak memory of one step, MiB", scale=fixed_scale(x_domain))
    y_scale = fixed_scale(y_domain)
    y = alt.Y("ms:Q", title="Time of one step, ms", scale=y_scale)
    layers: list[Chart] = []
    if front:
        base = alt.Chart(inline_data(front)).encode(x=x, y=y)
        layers += [
            base.mark_line(
                color="currentColor", opacity=0.45, strokeDash=[5, 4], strokeWidth=1.5
            ).encode(order="order:Q"),
            base.mark_point(color="currentColor", opacity=0.45, size=18, filled=True),
        ]
    budgets: list[Row] = [
        {"peak": v.budget_bytes / MIB, "colour": css_colour(roles[v.label])}
        for v in shown
        if v.kind is VariantKind.PLANNED
        and v.budget_bytes
        and x_domain[0] <= v.budget_bytes / MIB <= x_domain[1]
    ]
    if budgets:
        layers.append(
            alt.Chart(inline_data(budgets))
            .mark_rule(strokeDash=[2, 4], strokeWidth=1.5)
            .encode(x=x, color=literal(alt.Color, "colour"))
        )
    marks = alt.Chart(inline_data(points))
    colour = literal(alt.Color, "colour")
    layers.append(
        marks.mark_rule(strokeWidth=2, opacity=0.6).encode(
            x=x, y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=colour
        )
    )
    layers.append(
        marks.mark_point(filled=True, size=130, opacity=1).encode(
            x=x, y=y, color=colour, shape=literal(alt.Shape, "shape")
        )
    )
    rules = [row["peak"] for row in budgets]
    layers += _name_labels(points, rules, x, y, (x_domain, y_domain), (width, height))
    return svg_text(alt.layer(*layers).properties(width=width, height=height), "pareto", width)


def _row(variant: Variant, role: str) -> Row:
    assert variant.measured_peak_bytes is not None
    assert variant.step_times is not None
    low, high = np.percentile(variant.step_times.seconds, (25, 75))
    return {
        "peak": variant.measured_peak_bytes / MIB,
        "ms": variant.step_times.median_seconds * 1e3,
        "low": float(low) * 1e3,
        "high": float(high) * 1e3,
        "label": variant.label,
        "colour": css_colour(role),
        "shape": _SHAPES[variant.kind],
    }


def _name_labels(
    rows: Sequence[Row],
    rules: Sequence[float],
    x: Any,
    y: Any,
    domains: tuple[tuple[float, float], tuple[float, float]],
    size: tuple[int, int],
) -> list[Chart]:
    """Write each variant's name beside its point, a layer each: offsets belong to a mark."""
    import altair as alt

    (x_low, x_high), (y_low, y_high) = domains
    width, height = size
    pixels = [
        Point(
            (row["peak"] - x_low) / (x_high - x_low) * width,
            (y_high - row["ms"]) / (y_high - y_low) * height,
            row["label"],
        )
        for row in rows
    ]
    lines = [(peak - x_low) / (x_high - x_low) * width for peak in rules]
    layers = []
    places = place_labels(pixels, width, height, lines)
    for row, point, place in zip(rows, pixels, places, strict=True):
        base = alt.Chart(inline_data([row])).encode(x=x, y=y, text="label:N")
        look: dict[str, Any] = {
            "align": place.align,
            "baseline": "middle",
            "dx": place.x - point.x,
            "dy": place.y - point.y,
            "fontSize": 12,
            "fontWeight": 600,
        }
        # a halo in the colour of the card keeps the name readable where a line runs behind it
        layers.append(base.mark_text(**look, stroke="var(--card)", strokeWidth=5, fill="none"))
        layers.append(base.mark_text(**look, color="currentColor"))
    return layers


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Give the range of the values with a margin, wide enough where all are equal."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = (high - low) * 0.14 or max(abs(high) * 0.1, 1e-6)
    return max(low - margin, 0.0), high + margin
