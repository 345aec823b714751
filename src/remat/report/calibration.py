"""The page of a calibration: what was predicted against what was measured."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remat.cost.calibration import (
    PEAK_BYTES,
    STEP_SECONDS,
    Calibration,
    ErrorBar,
    Experience,
    Trial,
)
from remat.files import write_atomically
from remat.report import palette
from remat.report.drawing import Row, fixed_scale, inline_data, literal, require_pictures, svg_text
from remat.report.pages import page_environment

_SIZE = 420
_ROLE_OF_SOURCE = {"roofline": "policy-1", "calibrated": "plan-1", "measured": "plan-2"}
_SHAPE_OF_SOURCE = {"roofline": "square", "calibrated": "circle", "measured": "diamond"}
_QUANTITIES = (
    (STEP_SECONDS, "Step time, seconds"),
    (PEAK_BYTES, "Peak memory, bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """One quantity's picture with what it shows in words."""

    title: str
    alt: str
    svg: str
    bars: tuple[tuple[str, ErrorBar], ...]


def write_calibration(
    calibration: Calibration | None, experience: Experience, path: str | os.PathLike[str]
) -> Path:
    """Write the page; an interrupted write leaves the old page or none.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    return write_atomically(path, render_calibration(calibration, experience))


def render_calibration(calibration: Calibration | None, experience: Experience) -> str:
    """Make the page of a device: either part may be missing, and is then said to be.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    from markupsafe import Markup

    require_pictures()
    environment = page_environment()
    environment.filters["svg"] = Markup  # our own pictures, whose texts vega has escaped
    trials = (*check_trials(calibration), *experience.trials)
    return environment.get_template("calibration.html.j2").render(
        calibration=calibration,
        device=experience.device,
        num_runs=len({trial.run for trial in experience.trials}),
        scatters=[
            scatter(quantity, title, trials, experience)
            for quantity, title in _QUANTITIES
            if any(trial.quantity == quantity for trial in trials)
        ],
        marks=[
            (source, role, _SHAPE_OF_SOURCE[source])
            for source, role in _ROLE_OF_SOURCE.items()
            if any(trial.source == source for trial in trials)
        ],
        light=palette.css_variables(palette.LIGHT),
        dark=palette.css_variables(palette.DARK),
    )


def check_trials(calibration: Calibration | None) -> tuple[Trial, ...]:
    """Return the calibration's own checks as trials, by the calibration and by the roofline."""
    if calibration is None:
        return ()
    return tuple(
        Trial(
            run="",
            variant=check.name,
            quantity=STEP_SECONDS,
            source=source,
            predicted=predicted,
            measured=check.measured_seconds,
        )
        for check in calibration.checks
        for source, predicted in (
            ("roofline", check.roofline_seconds),
            ("calibrated", check.calibrated_seconds),
        )
    )


def scatter(quantity: str, title: str, trials: Sequence[Trial], experience: Experience) -> Scatter:
    """Draw measured against predicted on logarithmic axes, with the line of perfect prediction."""
    import altair as alt

    shown = [trial for trial in trials if trial.quantity == quantity]
    values = [value for trial in shown for value in (trial.predicted, trial.measured)]
    domain = (min(values) / 1.3, max(values) * 1.3)
    scale = fixed_scale(domain)
    scale.type = "log"
    # Whole bytes are too long for the names of an axis: 10G stands for 10,000,000,000.
    axis = alt.Axis(format="~s") if quantity == PEAK_BYTES else alt.Axis()
    x = alt.X("predicted:Q", title=f"{title}, predicted", scale=scale, axis=axis)
    y = alt.Y("measured:Q", title="measured", scale=scale, axis=axis)
    line = (
        alt.Chart(inline_data([{"predicted": v, "measured": v} for v in domain]))
        .mark_line(color="currentColor", opacity=0.5, strokeDash=[5, 4])
        .encode(x=x, y=y)
    )
    points = (
        alt.Chart(inline_data([_row(trial) for trial in shown]))
        .mark_point(size=70, strokeWidth=2, opacity=0.9)
        .encode(x=x, y=y, color=literal(alt.Color, "colour"), shape=literal(alt.Shape, "shape"))
    )
    sources = tuple(dict.fromkeys(trial.source for trial in shown))
    told = "; ".join(
        f"{source}: {sum(t.source == source for t in shown)} points, typically "
        f"{_typical_error(shown, source):.0%} off"
        for source in sources
    )
    return Scatter(
        title=title,
        alt=f"{title}: measured against predicted. {told}.",
        svg=svg_text((line + points).properties(width=_SIZE, height=_SIZE), quantity, _SIZE),
        bars=tuple(
            (source, bar)
            for source in sources
            if (bar := experience.error_bar(quantity, source)) is not None
        ),
    )


def _row(trial: Trial) -> Row:
    return {
        "predicted": trial.predicted,
        "measured": trial.measured,
        "colour": palette.css_colour(_ROLE_OF_SOURCE.get(trial.source, "reference")),
        "shape": _SHAPE_OF_SOURCE.get(trial.source, "cross"),
    }


def _typical_error(trials: Sequence[Trial], source: str) -> float:
    """Return the geometric mean of how many times too large or too small, minus one."""
    logs = [abs(math.log(t.measured / t.predicted)) for t in trials if t.source == source]
    return math.exp(sum(logs) / len(logs)) - 1
