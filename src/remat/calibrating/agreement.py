"""The planner's own calibration: how far predictions of recorded runs were from measurements."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from remat.cost.calibration import PEAK_BYTES, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Predicted against measured for one quantity, over variants of several runs.

    Errors are predicted over measured, minus one: negative where the prediction was too low.
    `worst` is the trial that was furthest off, `num_below` counts predictions that were too low
    by more than a thousandth.
    """

    quantity: str
    source: str
    num_runs: int
    num_trials: int
    median_error: float
    median_absolute_error: float
    largest_absolute_error: float
    num_below: int
    worst: Trial


# Below a thousandth, a prediction of bytes is right for every use of it.
_RIGHT = 1e-3


def agreements(trials: Iterable[Trial]) -> tuple[Agreement, ...]:
    """Sum up trials for each quantity and source of seconds; peaks depend on no source.

    Example
    -------
    >>> trial = {"run": "a", "variant": "no plan", "quantity": "peak_bytes", "source": "roofline"}
    >>> found, = agreements([Trial(**trial, predicted=99, measured=100)])
    >>> round(found.median_error, 4), found.num_below
    (-0.01, 1)
    """
    grouped: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        source = "" if trial.quantity == PEAK_BYTES else trial.source
        grouped.setdefault((trial.quantity, source), []).append(trial)
    return tuple(
        _summed_up(quantity, source, found) for (quantity, source), found in sorted(grouped.items())
    )


def error_of(trial: Trial) -> float:
    """Give predicted over measured, minus one."""
    return trial.predicted / trial.measured - 1


def _summed_up(quantity: str, source: str, trials: list[Trial]) -> Agreement:
    errors = [error_of(trial) for trial in trials]
    return Agreement(
        quantity=quantity,
        source=source,
        num_runs=len({trial.run for trial in trials}),
        num_trials=len(trials),
        median_error=statistics.median(errors),
        median_absolute_error=statistics.median(abs(error) for error in errors),
        largest_absolute_error=max(abs(error) for error in errors),
        num_below=sum(error < -_RIGHT for error in errors),
        worst=max(trials, key=lambda trial: abs(error_of(trial))),
    )
