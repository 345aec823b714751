"""The picture of the loss curves, all on top of each other."""

from __future__ import annotations

import math

from remat.report.drawing import Row, inline_data, svg_text
from remat.report.palette import css_colour, variant_roles
from remat.runs.records import Run, Variant

_MAX_POINTS = 400


def loss_picture(run: Run, *, width: int, height: int) -> str:
    """Draw all loss curves on top of each other, the first widest: equal ones show as bands."""
    import altair as alt

    roles = variant_roles(run.variants)
    shown = [variant for variant in run.variants if variant.losses]
    x = alt.X("step:Q", title="Training step")
    y = alt.Y("loss:Q", title="Training loss", scale=alt.Scale(zero=False))
    layers = []
    for place, variant in enumerate(shown):
        stroke = 2.0 + 3.2 * (len(shown) - 1 - place)
        layers.append(
            alt.Chart(inline_data(_loss_rows(variant)))
            .mark_line(
                strokeWidth=stroke,
                color=css_colour(roles[variant.label]),
                strokeJoin="round",
                interpolate="linear",
            )
            .encode(x=x, y=y)
        )
    return svg_text(alt.layer(*layers).properties(width=width, height=height), "losses", width)


def _loss_rows(variant: Variant) -> list[Row]:
    stride = max(1, -(-len(variant.losses) // _MAX_POINTS))
    return [
        {"step": step, "loss": loss}
        for step, loss in enumerate(variant.losses)
        if step % stride == 0 and math.isfinite(loss)
    ]
