"""Bytes alive by kind at every tick of a recorded step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from remat.trace.records import (
    BASE_KINDS,
    CRUMBS_BYTES,
    KINDS,
    TEMPORARIES,
    OpSignature,
    StepTrace,
)


def memory_by_kind(
    trace: StepTrace, workspace: Mapping[OpSignature, int] | None = None
) -> dict[str, NDArray[np.int64]]:
    """Return, for each kind, the bytes alive at each tick, (num_ticks,).

    For a trace with `drop_saved=False`: what autograd holds is in the storages' own intervals.
    `workspace` are bytes that kernels take beside inputs and outputs; they count as temporaries.
    """
    changes = {kind: np.zeros(trace.num_ticks + 2, dtype=np.int64) for kind in KINDS}
    for storage in trace.storages:
        changed = changes[storage.kind]
        if storage.kind in BASE_KINDS:
            changed[0] += storage.size_bytes
            continue
        for start, end in storage.intervals:
            changed[start] += storage.size_bytes
            changed[end + 1] -= storage.size_bytes
    curves = {kind: np.cumsum(changed)[: trace.num_ticks] for kind, changed in changes.items()}
    curves[TEMPORARIES] += CRUMBS_BYTES
    if workspace:
        for op in trace.ops:
            curves[TEMPORARIES][op.tick] += workspace.get(trace.signatures[op.signature], 0)
    return curves


def peak_tick(curves: Mapping[str, NDArray[np.int64]]) -> int:
    """Return the first tick at which the most bytes are alive."""
    return int(np.argmax(np.sum(list(curves.values()), axis=0)))


def breakdown_at(curves: Mapping[str, NDArray[np.int64]], tick: int) -> dict[str, int]:
    """Return the bytes of each kind at one tick."""
    return {kind: int(curve[tick]) for kind, curve in curves.items()}
