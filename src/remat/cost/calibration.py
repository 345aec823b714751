"""Calibration: what `remat calibrate` measured on a device, kept in the user's cache.

Two files for each row of the device table, as CPU speed also depends on the number of threads:
`<row>.json` holds speeds (`Calibration`), `<row>.experience.json` what was predicted and then
measured (`Experience`), from which predictions get their error bars.
"""

from __future__ import annotations

import bisect
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from remat.cost.families import BY_FLOPS, POINTWISE, family_of, work_of
from remat.errors import DeviceError, PlanFileError
from remat.files import Record
from remat.trace.records import OpSignature

_log = logging.getLogger(__name__)

# What is predicted and then measured: `Trial.quantity`.
STEP_SECONDS, PEAK_BYTES = "step_seconds", "peak_bytes"

_LEVEL = 0.9
_FEWEST = 3
_BYTES_ARE_BYTES = (POINTWISE, "float32")

R = TypeVar("R", bound=Record)


class Curve(Record):
    """Seconds of one family of ops against its work: FLOPs where it multiplies, else bytes."""

    family: str
    dtype: str
    points: tuple[tuple[float, float], ...] = Field(
        min_length=1, description="Work and seconds, both rising; dispatch is included."
    )

    def seconds(self, work: float) -> float:
        """Interpolate between the points in logarithms; beyond them, at the rate of the last one.

        Below the smallest work that was measured its time is dispatch, and stays.
        """
        place = bisect.bisect_left(self.points, (work, 0.0))
        if place == 0:
            return self.points[0][1]
        low, low_s = self.points[place - 1]
        if place == len(self.points):
            return low_s * work / low
        high, high_s = self.points[place]
        share = math.log(work / low) / math.log(high / low)
        return math.exp(math.log(low_s) + share * math.log(high_s / low_s))


class AllocatorFacts(Record):
    """How the device's allocator rounds, in bytes: as measured, not as documented."""

    rounding_bytes: int
    small_segment_bytes: int | None = None
    large_segment_bytes: int | None = None


class WorkspaceFact(Record):
    """What one convolution takes for itself while it runs."""

    operation: str
    operand_bytes: int
    workspace_bytes: int


class Check(Record):
    """One step that had no part in the calibration: predicted with it, without it, and measured."""

    name: str
    calibrated_seconds: float
    roofline_seconds: float
    measured_seconds: float


class Calibration(Record):
    """Speeds of one device, measured; made by `remat.calibrate`."""

    schema_version: int = 1
    device: str = Field(description="Row of the device table that the figures replace.")
    hardware: str
    num_threads: int
    torch_version: str
    created: str = Field(description="UTC, ISO 8601.")
    curves: tuple[Curve, ...]
    region_overhead_s: float
    saved_tensor_overhead_s: float
    host_bytes_per_s: float
    allocator: AllocatorFacts
    workspaces: tuple[WorkspaceFact, ...] = ()
    checks: tuple[Check, ...] = ()

    @cached_property
    def _by_kind(self) -> Mapping[tuple[str, str], Curve]:
        return {(curve.family, curve.dtype): curve for curve in self.curves}

    def op_seconds(
        self, signature: OpSignature, dtype: str, flops: int, moved_bytes: int
    ) -> float | None:
        """Return the seconds of an op, or `None` where nothing like it was measured.

        Families by bytes that were not measured in this dtype, or at all, go by pointwise ops.
        """
        family = family_of(signature.name)
        curve = self._by_kind.get((family, dtype))
        if curve is None and family not in BY_FLOPS:
            curve = self._by_kind.get((POINTWISE, dtype)) or self._by_kind.get(_BYTES_ARE_BYTES)
        if curve is None:
            return None
        return curve.seconds(work_of(signature, flops, moved_bytes))


class Trial(Record):
    """One prediction and what was then measured."""

    run: str
    variant: str
    quantity: str = Field(description="step_seconds or peak_bytes.")
    source: str = Field(description="What priced the ops: calibrated, measured or roofline.")
    predicted: float = Field(gt=0)
    measured: float = Field(gt=0)


class ErrorBar(Record):
    """Where the next measurement lies, as multiples of the prediction.

    Distribution-free, from order statistics: of n + 1 exchangeable ratios the last lies between
    the k-th and the (n + 1 - k)-th of the others with probability (n + 1 - 2k) / (n + 1).
    """

    low_ratio: float
    high_ratio: float
    level: float
    num_trials: int


class Experience(Record):
    """Every prediction on one device that was measured afterwards."""

    schema_version: int = 1
    device: str
    trials: tuple[Trial, ...] = ()

    def with_trials(self, more: Iterable[Trial]) -> Experience:
        """Add trials; those of a run that is known already take the place of the old ones."""
        fresh = tuple(more)
        runs = {trial.run for trial in fresh}
        kept = tuple(trial for trial in self.trials if trial.run not in runs)
        return self.model_copy(update={"trials": kept + fresh})

    def error_bar(self, quantity: str, source: str) -> ErrorBar | None:
        """Return the interval of measured over predicted; `None` with fewer than three trials."""
        ratios = sorted(
            trial.measured / trial.predicted
            for trial in self.trials
            if trial.quantity == quantity and trial.source == source
        )
        number = len(ratios)
        if number < _FEWEST:
            return None
        cut = max(1, math.floor((number + 1) * (1 - _LEVEL) / 2))
        return ErrorBar(
            low_ratio=ratios[cut - 1],
            high_ratio=ratios[number - cut],
            level=(number + 1 - 2 * cut) / (number + 1),
            num_trials=number,
        )


def cache_folder() -> Path:
    """Folder of calibrations: `REMAT_CACHE`, else `remat` in the user's cache."""
    given = os.environ.get("REMAT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remat"


def calibration_path(device: str, num_threads: int | None) -> Path:
    """File of a device's calibration; `num_threads` for a CPU, else `None`."""
    return cache_folder() / "calibration" / f"{_key(device, num_threads)}.json"


def experience_path(device: str, num_threads: int | None) -> Path:
    """File of what was predicted and measured on a device."""
    return cache_folder() / "calibration" / f"{_key(device, num_threads)}.experience.json"


def load_calibration(
    device: str, num_threads: int | None, torch_version: str
) -> Calibration | None:
    """Return the calibration of a device, or `None` where there is none for this torch.

    Raises
    ------
    DeviceError: if the file is damaged; the message says how to make it again.
    """
    path = calibration_path(device, num_threads)
    found = _load(Calibration, path)
    if found is not None and found.torch_version != torch_version:
        _log.warning(
            "calibration of %s was made with torch %s, not %s, and is not used; "
            "`remat calibrate` makes it again", device, found.torch_version, torch_version,
        )  # fmt: skip
        return None
    return found


def load_experience(device: str, num_threads: int | None) -> Experience:
    """Return what was predicted and measured on a device, if anything.

    Raises
    ------
    DeviceError: if the file is damaged.
    """
    found = _load(Experience, experience_path(device, num_threads))
    return found or Experience(device=device)


def _load(kind: type[R], path: Path) -> R | None:
    try:
        return kind.load(path) if path.exists() else None
    except (PlanFileError, OSError) as error:
        raise DeviceError(f"{error} Delete it, or make it again with `remat calibrate`.") from error


def _key(device: str, num_threads: int | None) -> str:
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", device)
    return name if num_threads is None else f"{name}-{num_threads}threads"
