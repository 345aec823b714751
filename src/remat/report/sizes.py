"""The page of what fits where: one table and one picture, without scripts or a network."""

from __future__ import annotations

import os
from pathlib import Path

from remat.files import write_atomically
from remat.report import palette
from remat.report.drawing import inline_data, literal, require_pictures, svg_text
from remat.report.pages import page_environment
from remat.sizing.records import Mode, Survey

_WIDTHS = {"wide": 900, "narrow": 340}  # of the picture, on a desktop and on a phone
_BESIDE = 160  # for names of devices, and figures at the ends of bars
_TITLES = {
    "batch": "number of examples per step",
    "sequence": "number of tokens per sequence",
    "image size": "side of images, pixels",
    "depth": "number of layers",
}
_ROLES = {Mode.NOTHING: "reference", Mode.ALL_BLOCKS: "policy-1", Mode.PLANNED: "plan-1"}


def write_survey(survey: Survey, path: str | os.PathLike[str]) -> Path:
    """Write the page; an interrupted write leaves the old page or none.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    return write_atomically(path, render_survey(survey))


def render_survey(survey: Survey) -> str:
    """Make the page of a survey.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    from markupsafe import Markup

    require_pictures()
    told = "; ".join(
        f"{row.device}: " + ", ".join(f"{s.mode.value} {s.largest}" for s in row.sizes)
        for row in survey.devices
    )
    return (
        page_environment()
        .get_template("sizes.html.j2")
        .render(
            survey=survey,
            roles=[(mode.value, role) for mode, role in _ROLES.items()],
            pictures={
                name: Markup(sizes_picture(survey, width))  # noqa: S704  our own, escaped by vega
                for name, width in _WIDTHS.items()
            },
            told=told,
            light=palette.css_variables(palette.LIGHT),
            dark=palette.css_variables(palette.DARK),
        )
    )


def sizes_picture(survey: Survey, picture_width: int) -> str:
    """Draw the largest size of each device and mode as bars."""
    import altair as alt

    rows = [
        {
            "device": row.device,
            "mode": size.mode.value,
            "largest": size.largest,
            "colour": palette.css_colour(_ROLES[size.mode]),
        }
        for row in survey.devices
        for size in row.sizes
    ]
    order = [row.device for row in survey.devices]
    modes = [mode.value for mode in Mode]
    title = _TITLES[survey.dimension]
    y = alt.Y("device:N", sort=order, title=None)
    offset = alt.YOffset("mode:N", sort=modes)
    axis = alt.Axis(format="~s", labelOverlap=True)
    x = alt.X("largest:Q", title=f"largest {title}", axis=axis)
    base = alt.Chart(inline_data(rows)).encode(y=y, yOffset=offset, x=x)
    bars = base.mark_bar().encode(color=literal(alt.Color, "colour"))
    texts = base.mark_text(align="left", dx=4, fontSize=10, color="currentColor").encode(
        text=alt.Text("largest:Q", format=",")
    )
    height = max(60, 46 * len(order))
    chart = (bars + texts).properties(width=picture_width - _BESIDE, height=height)
    return svg_text(chart, "sizes", picture_width)
