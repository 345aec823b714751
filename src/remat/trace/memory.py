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
    WRAPPED_KINDS,
    OpSignature,
    StepTrace,
)

# How the root module, whose own name is empty, is called.
MODEL = "model"


def memory_by_kind(
    trace: StepTrace, workspace: Mapping[OpSignature, int] | None = None
) -> dict[str, NDArray[np.int64]]:
    """Return, for each kind, the bytes alive at each tick, (num_ticks,).

    For a trace with `drop_saved=False`: what autograd holds is in the storages' own intervals.
    Kinds that only wrapped models have are there where a storage is of them.
    `workspace` are bytes that kernels take beside inputs and outputs; they count as temporaries.
    """
    present = {storage.kind for storage in trace.storages}
    changes = {
        kind: np.zeros(trace.num_ticks + 2, dtype=np.int64)
        for kind in KINDS
        if kind not in WRAPPED_KINDS or kind in present
    }
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


def by_module_at(trace: StepTrace, tick: int, breakdown: Mapping[str, int]) -> dict[str, int]:
    """Share out the bytes alive at one tick among the modules that made them, most bytes first.

    Parameters and activations go to their module; what no module made (optimizer state, gradients,
    temporaries of backward) stands under its kind in brackets. The sum is that of `breakdown`.
    """
    shares: dict[str, int] = {}
    rest = dict(breakdown)
    for number, storage in enumerate(trace.storages):
        owner = _owner(trace, number)
        is_alive = storage.kind in BASE_KINDS or any(
            start <= tick <= end for start, end in storage.intervals
        )
        if is_alive and owner is not None:
            shares[owner] = shares.get(owner, 0) + storage.size_bytes
            rest[storage.kind] -= storage.size_bytes
    shares |= {f"({kind})": size for kind, size in rest.items()}
    return {name: size for name, size in sorted(shares.items(), key=lambda one: -one[1]) if size}


def _owner(trace: StepTrace, number: int) -> str | None:
    """Return the module that a storage belongs to; the model itself is `model`."""
    storage = trace.storages[number]
    if number in trace.parameter_names:
        return trace.parameter_names[number][0].rpartition(".")[0] or MODEL
    return trace.calls[storage.call].module or MODEL if storage.call >= 0 else None
