"""Learn: compare what was predicted with what was measured, over recorded runs."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from remat.cost.calibration import (
    PEAK_BYTES,
    STEP_SECONDS,
    Trial,
    experience_path,
    load_experience,
)
from remat.cost.usual import source_kind
from remat.errors import DeviceError, RunError
from remat.runs.records import Run
from remat.runs.store import list_runs, load_run

_log = logging.getLogger(__name__)


def trials_of(run: Run) -> tuple[Trial, ...]:
    """List each prediction of a run that was measured: seconds per step, and peak bytes."""
    found = []
    for variant in run.variants:
        plan = variant.plan
        if plan is None:
            continue
        pairs = []
        if variant.step_times is not None:
            measured_s = variant.step_times.median_seconds
            pairs.append((STEP_SECONDS, plan.predicted_step_seconds, measured_s))
        if variant.measured_peak_bytes and variant.predicted_peak_bytes:
            pairs.append((PEAK_BYTES, variant.predicted_peak_bytes, variant.measured_peak_bytes))
        found += [
            Trial(
                run=run.id,
                variant=variant.label,
                quantity=quantity,
                source=source_kind(plan.cost_source),
                predicted=predicted,
                measured=measured,
            )
            for quantity, predicted, measured in pairs
            if predicted > 0 and measured > 0
        ]
    return tuple(found)


def learn(run: Run) -> None:
    """Add a run's trials to what is known of its device; later plans have error bars from it.

    Nothing depends on it: where the cache cannot be written or read, a warning says so.
    """
    _learn_all([run])


def learn_from_store(root: str | os.PathLike[str] | None = None) -> int:
    """Learn from every run of a store that can be read; return how many there were."""
    runs = [run for entry in list_runs(root) if (run := _readable(entry.path)) is not None]
    _learn_all(runs)
    return len(runs)


def _readable(path: Path) -> Run | None:
    try:
        return load_run(path)
    except RunError as error:
        _log.warning("%s", error)
        return None


def _learn_all(runs: Iterable[Run]) -> None:
    by_device: dict[tuple[str, int | None], list[Trial]] = defaultdict(list)
    for run in runs:
        device = next((v.plan.device for v in run.variants if v.plan is not None), "")
        threads = run.environment.num_threads if run.environment.device == "cpu" else None
        if device:
            by_device[device, threads] += trials_of(run)
    for (device, threads), trials in by_device.items():
        _add(device, threads, trials)


def _add(device: str, threads: int | None, trials: list[Trial]) -> None:
    try:
        known = load_experience(device, threads)
        known.with_trials(trials).save(experience_path(device, threads))
    except (DeviceError, OSError) as error:
        _log.warning("nothing was learnt about %s: %s", device, error)
