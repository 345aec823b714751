"""Fully sharded training (FSDP2): what of a step's memory is left on each of N devices.

Parameters, gradients and optimizer state are cut into N parts (Zhao et al. 2023, arXiv 2304.11277).
A block's parameters are gathered while it computes, and those of the next one meanwhile; its
gradients are whole until they are reduced. Parameters outside the blocks stay gathered from forward
to backward. Communication takes no time here.
"""

from __future__ import annotations

import copy
import dataclasses

from remat.errors import WorkloadError
from remat.planner.blocks import find_blocks
from remat.trace.records import (
    BUFFERS,
    GRADIENTS,
    OPTIMIZER,
    OPTIMIZER_STATE,
    PARAMETERS,
    StepTrace,
    Storage,
)

_SHARDED = frozenset({PARAMETERS, GRADIENTS, OPTIMIZER_STATE})


def gathered_bytes(trace: StepTrace) -> int:
    """Return the most bytes of parameters and gradients that are whole on a device at once."""
    of_block = []
    in_blocks: set[int] = set()
    for number in find_blocks(trace):
        call = trace.calls[number]
        inside = {
            storage
            for op in trace.ops[call.first_op : call.stop_op]
            for storage in op.inputs
            if trace.storages[storage].kind == PARAMETERS
        }
        in_blocks |= inside
        of_block.append(sum(trace.storages[s].size_bytes for s in inside))
    outside = sum(
        s.size_bytes
        for number, s in enumerate(trace.storages)
        if s.kind == PARAMETERS and number not in in_blocks
    )
    largest = max(of_block, default=0)
    # Two blocks' parameters, the rest's, and the gradients of one of them.
    return 2 * largest + outside + max(largest, outside)


def shard(trace: StepTrace, num_shards: int) -> StepTrace:
    """Return the trace as it is on one of `num_shards` devices.

    Raises
    ------
    WorkloadError: if the number is not a whole number from 1 up.
    """
    if isinstance(num_shards, bool) or not isinstance(num_shards, int) or num_shards < 1:
        raise WorkloadError(f"shards must be a whole number from 1 up, got {num_shards!r}.")
    if num_shards == 1:
        return trace
    begin = trace.phase_start[OPTIMIZER]
    storages = []
    for storage in trace.storages:
        made = copy.copy(storage)
        # What the optimizer makes has the shape of parameters.
        if storage.kind in _SHARDED or storage.birth >= begin:
            made.size_bytes = -(-storage.size_bytes // num_shards)
        storages.append(made)
    buffer = Storage(gathered_bytes(trace), BUFFERS, 0, -1, [(0, trace.num_ticks - 1)])
    return dataclasses.replace(trace, storages=[*storages, buffer], handover=None)
