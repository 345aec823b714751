"""Runs of one workload from several seeds and devices, put together device by device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pydantic import Field

from remat.files import Record
from remat.runs.reading import final_quality
from remat.runs.records import Run, Variant, Verdict


class DeviceResult(Record):
    """One variant on one device, over the seeds that it was run from."""

    workload: str
    device: str
    variant: str
    num_runs: int
    num_failed: int = Field(description="Runs in which a check of this variant failed.")
    peak_bytes: int | None = Field(description="Measured, the largest of the runs.")
    step_seconds: float | None = Field(description="Median of the runs' medians.")
    metric: str | None = Field(description="What stands for quality, at the end of training.")
    quality: float | None = Field(description="Its mean over the runs.")
    loss_difference: float | None = Field(
        description="Largest difference of a training loss from the same seed on the first device; "
        "0 is equal bit for bit, None on the first device or without a common seed."
    )


def by_device(runs: Sequence[Run]) -> tuple[DeviceResult, ...]:
    """Put runs together by workload, device and variant, in the order in which they come.

    Devices differ in kernels, and so in the last bits: their losses are compared seed by seed.
    """
    groups: dict[tuple[str, str, str], list[tuple[Run, Variant]]] = {}
    for run in runs:
        for variant in run.variants:
            key = (run.name, run.environment.device, variant.label)
            groups.setdefault(key, []).append((run, variant))
    first: dict[tuple[str, str], list[tuple[Run, Variant]]] = {}
    for (name, _, label), group in groups.items():
        first.setdefault((name, label), group)
    return tuple(_result(key, group, first[key[0], key[2]]) for key, group in groups.items())


def _result(
    key: tuple[str, str, str],
    group: Sequence[tuple[Run, Variant]],
    first: Sequence[tuple[Run, Variant]],
) -> DeviceResult:
    name, device, label = key
    variants = [variant for _, variant in group]
    peaks = [one.measured_peak_bytes for one in variants if one.measured_peak_bytes is not None]
    times = [one.step_times.median_seconds for one in variants if one.step_times is not None]
    qualities = [found for one in variants if (found := final_quality(one)) is not None]
    return DeviceResult(
        workload=name,
        device=device,
        variant=label,
        num_runs=len(variants),
        num_failed=sum(one.verdict is Verdict.FAILED for one in variants),
        peak_bytes=max(peaks, default=None),
        step_seconds=statistics.median(times) if times else None,
        metric=qualities[0][0] if qualities else None,
        quality=statistics.fmean(value for _, value in qualities) if qualities else None,
        loss_difference=None if group is first else _loss_difference(group, first),
    )


def _loss_difference(
    group: Sequence[tuple[Run, Variant]], first: Sequence[tuple[Run, Variant]]
) -> float | None:
    there = {run.seed: variant.losses for run, variant in first}
    pairs = [
        (mine, other)
        for run, variant in group
        for mine, other in zip(variant.losses, there.get(run.seed, ()), strict=False)
    ]
    return max((abs(mine - other) for mine, other in pairs), default=None)
