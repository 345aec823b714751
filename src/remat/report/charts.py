"""Pictures of the evidence: equivalence against its margin, reliability, slices, latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from remat.report.drawing import Chart, Row, fixed_scale, inline_data, literal, svg_text
from remat.report.evidence import MOST_SLICES, slice_rows
from remat.report.palette import css_colour
from remat.report.tables import seconds
from remat.runs.evidence import Calibration, CalibrationEvidence, SliceQuality
from remat.runs.reading import best_planned, metric_name, reference_of
from remat.runs.records import Run

_LIMIT = 2.0  # margins shown to either side; what lies further out is cut at the edge
_ROW = 30
_FORM_SHAPES = (
    "circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left",
    "triangle-right",
)  # fmt: skip
_FORM_ROLES = (
    "reference", "policy-1", "plan-1", "policy-2", "plan-2", "policy-3", "plan-4", "plan-3",
)  # fmt: skip


def equivalence_picture(run: Run, *, width: int) -> str:
    """Draw each difference with its interval in units of its margin; the band is the margin."""
    import altair as alt

    rows = []
    for e in run.equivalences:
        found = e.difference
        value, low, high = (
            (0.0, 0.0, 0.0) if found is None else (found.value, found.low, found.high)
        )
        scale = e.margin or 1.0
        rows.append(
            {
                "name": f"{e.variant} · {metric_name(e.metric)}",
                "value": _cut(value / scale),
                "low": _cut(low / scale),
                "high": _cut(high / scale),
                "colour": css_colour("plan-1" if e.is_equivalent else "policy-1"),
                "shape": "circle" if e.is_equivalent else "square",
            }
        )
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=width // 3))
    x = alt.X(
        "value:Q",
        title="difference from no plan, in margins",
        scale=fixed_scale((-_LIMIT, _LIMIT)),
        axis=alt.Axis(tickCount=5),
    )
    band = (
        alt.Chart(inline_data([{"low": -1, "high": 1}]))
        .mark_rect(color=css_colour("act-backward"), opacity=0.16)
        .encode(x=alt.X("low:Q", scale=fixed_scale((-_LIMIT, _LIMIT))), x2="high:Q")
    )
    zero = alt.Chart(inline_data([{"value": 0}])).mark_rule(color="currentColor", opacity=0.4)
    marks = alt.Chart(inline_data(rows))
    colour = literal(alt.Color, "colour")
    layers = [
        band,
        zero.encode(x=x),
        marks.mark_rule(strokeWidth=2.5).encode(y=y, x="low:Q", x2="high:Q", color=colour),
        marks.mark_point(filled=True, size=90, opacity=1).encode(
            y=y, x=x, color=colour, shape=literal(alt.Shape, "shape")
        ),
    ]
    height = max(60, _ROW * len(rows))
    chart = alt.layer(*layers).properties(width=_inner(width), height=height)
    return svg_text(chart, "equivalence", width, left=_spare(rows, width))


def _cut(value: float) -> float:
    return value if math.isnan(value) else max(-_LIMIT, min(_LIMIT, value))


def _inner(width: int) -> int:
    """Leave room for the names of the rows."""
    return width - width // 3 - 20


def _spare(rows: Sequence[Row], width: int) -> int:
    """Leave a quarter more than the longest name takes here: fonts differ by as much."""
    longest = max((len(str(row["name"])) for row in rows), default=0)
    return min(width // 3, 6 * longest) // 4


def reliability_picture(found: CalibrationEvidence, *, width: int, height: int) -> str:
    """Draw accuracy against confidence, before and after temperature; sizes are examples."""
    import altair as alt

    rows = _bins(found.before, "reference", "diamond")
    if found.after is not None:
        rows += _bins(found.after, "plan-1", "circle")
    one = fixed_scale((0.0, 1.0))
    x = alt.X("confidence:Q", title="confidence", scale=one, axis=alt.Axis(format="%"))
    y = alt.Y("accuracy:Q", title="share that was right", scale=one, axis=alt.Axis(format="%"))
    diagonal = (
        alt.Chart(inline_data([{"confidence": v, "accuracy": v} for v in (0, 1)]))
        .mark_line(color="currentColor", opacity=0.5, strokeDash=[5, 4], strokeWidth=1.5)
        .encode(x=x, y=y)
    )
    marks = alt.Chart(inline_data(rows))
    colour = literal(alt.Color, "colour")
    gaps = marks.mark_rule(strokeWidth=1.5, opacity=0.7).encode(
        x=x, y=y, y2="confidence:Q", color=colour
    )
    most = max((row["num"] for row in rows), default=1)
    size = alt.Size("num:Q", scale=alt.Scale(domain=[0, most], range=[25, 260]), legend=None)
    points = marks.mark_point(filled=True, opacity=0.9).encode(
        x=x, y=y, color=colour, shape=literal(alt.Shape, "shape"), size=size
    )
    chart = alt.layer(diagonal, gaps, points).properties(width=width - 70, height=height)
    return svg_text(chart, "reliability", width)


def _bins(found: Calibration, role: str, shape: str) -> list[Row]:
    return [
        {
            "confidence": one.confidence,
            "accuracy": one.accuracy,
            "num": one.num_examples,
            "colour": css_colour(role),
            "shape": shape,
        }
        for one in found.bins
        if one.confidence is not None and one.accuracy is not None
    ]


def slices_picture(run: Run, *, width: int) -> str:
    """Draw every slice without a plan and under the smallest plan, one above the other."""
    import altair as alt

    pairs = slice_rows(run)[:MOST_SLICES]
    rows: list[Row] = []
    for without, planned in pairs:
        rows += _slice_marks(without, "reference", "diamond", "0")
        rows += _slice_marks(planned, "plan-1", "circle", "1")
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=width // 3))
    offset = alt.YOffset("side:N", sort=["0", "1"])
    first = next((one for pair in pairs for one in pair if one), None)
    title = "" if first is None else metric_name(first.metric)
    axis = alt.Axis(format="%") if title == "accuracy" else alt.Axis()
    x = alt.X("value:Q", title=title, scale=alt.Scale(zero=False), axis=axis)
    colour = literal(alt.Color, "colour")
    base = alt.Chart(inline_data(rows)).encode(y=y, yOffset=offset, color=colour)
    layers = [
        base.mark_rule(strokeWidth=2, opacity=0.75).encode(x="low:Q", x2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x, shape=literal(alt.Shape, "shape")
        ),
    ]
    height = max(60, _ROW * len(pairs))
    chart = alt.layer(*layers).properties(width=_inner(width), height=height)
    return svg_text(chart, "slices", width, left=_spare(rows, width))


def _slice_marks(found: SliceQuality | None, role: str, shape: str, side: str) -> list[Row]:
    if found is None or found.quality is None:
        return []
    return [
        {
            "name": found.name,
            "value": found.quality.value,
            "low": found.quality.low,
            "high": found.quality.high,
            "colour": css_colour(role),
            "shape": shape,
            "side": side,
        }
    ]


def latency_picture(run: Run, *, width: int, height: int) -> str:
    """Draw the 95th percentile of latency against batch size, a line for each form."""
    import altair as alt

    assert run.serving is not None
    looks = form_looks(run)
    rows: list[Row] = [
        {
            "batch": one.batch_size,
            "p50": one.p50_seconds * 1e3,
            "p95": one.p95_seconds * 1e3,
            "form": one.form,
            "colour": css_colour(looks[one.form][0]),
            "shape": looks[one.form][1],
        }
        for one in run.serving.latencies
    ]
    sizes = sorted({row["batch"] for row in rows})
    log = alt.Scale(type="log", base=2, nice=False)
    x = alt.X("batch:Q", title="batch size", scale=log, axis=alt.Axis(values=sizes, format="d"))
    y = alt.Y("p95:Q", title="latency p95, ms", scale=alt.Scale(type="log", nice=False))
    colour = literal(alt.Color, "colour")
    base = alt.Chart(inline_data(rows)).encode(x=x, color=colour, detail="form:N")
    layers: list[Any] = [
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_rule(strokeWidth=1.5, opacity=0.35).encode(y=y, y2="p50:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            y=y, shape=literal(alt.Shape, "shape")
        ),
    ]
    if run.serving.target_p95_seconds is not None:
        target = [{"p95": run.serving.target_p95_seconds * 1e3}]
        rule: Chart = alt.Chart(inline_data(target)).mark_rule(
            color=css_colour("budget"), strokeWidth=1.8, strokeDash=[6, 3]
        )
        text = alt.Chart(inline_data(target)).mark_text(
            align="left", baseline="bottom", dy=-3, fontSize=11, fontWeight=600,
            color=css_colour("budget"),
            text=f"target {seconds(run.serving.target_p95_seconds)}",
        )  # fmt: skip
        layers += [rule.encode(y=y), text.encode(y=y, x=alt.value(4))]
    chart = alt.layer(*layers).properties(width=width - 80, height=height)
    return svg_text(chart, "latency", width)


def form_looks(run: Run) -> dict[str, tuple[str, str]]:
    """Give every form of the served model its colour role and the shape of its points."""
    assert run.serving is not None
    names = list(dict.fromkeys(one.form for one in run.serving.latencies))
    return {
        name: (_FORM_ROLES[i % len(_FORM_ROLES)], _FORM_SHAPES[i % len(_FORM_SHAPES)])
        for i, name in enumerate(names)
    }


def shown_calibration(run: Run) -> tuple[str, CalibrationEvidence] | None:
    """Choose the calibration to draw: the smallest plan's, else any."""
    best = best_planned(run.variants)
    for variant in (best, reference_of(run.variants), *run.variants):
        if variant is not None and variant.calibration is not None:
            return variant.label, variant.calibration
    return None
