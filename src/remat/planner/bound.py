"""Lower bound: what any recomputation of ops must cost at least to stay within a budget."""

from __future__ import annotations

import numpy as np

from remat.cost.model import StepCost
from remat.planner.timeline import Timeline
from remat.trace.records import BASE_KINDS, FORWARD

_NUM_CUTS = 48


def lower_bound_seconds(timeline: Timeline, cost: StepCost, budget_bytes: int) -> float:
    """Bound from below the seconds of any op-level recomputation within a budget.

    At one moment of the step (a cut), each storage that only saved tensors hold is either alive, or
    the op that made it runs again later. Choosing which to free is a knapsack; its relaxation to
    fractions, solved greedily by cost per byte, bounds every plan that keeps the order of ops and
    the program's own references. The bound is the largest over a set of cuts. It ignores that
    re-running an op may need others, and the working set of recomputation: it may not be reachable.
    """
    trace = timeline.trace
    keep_all = timeline.curve(()).alive
    over = np.flatnonzero(keep_all > budget_bytes)
    if not len(over):
        return 0.0
    cuts = {int(over[np.argmax(keep_all[over])])}
    cuts |= {int(t) for t in over[:: max(1, len(over) // _NUM_CUTS)]}
    maker: dict[int, int] = {}
    for position, op in enumerate(trace.ops):
        if op.phase == FORWARD:
            for storage in op.fresh:
                maker[storage] = position
    return max(
        _at_cut(timeline, cost, maker, tick, int(keep_all[tick]) - budget_bytes) for tick in cuts
    )


def _at_cut(
    timeline: Timeline, cost: StepCost, maker: dict[int, int], tick: int, excess: int
) -> float:
    freeable: dict[int, int] = {}
    for storage, numbers in timeline.handles_of.items():
        record = timeline.trace.storages[storage]
        if record.kind in BASE_KINDS or storage not in maker or not record.size_bytes:
            continue
        if any(start <= tick <= end for start, end in record.intervals):
            continue
        handles = (timeline.trace.handles[n] for n in numbers)
        if any(h.pack <= tick <= h.end for h in handles):
            position = maker[storage]
            freeable[position] = freeable.get(position, 0) + record.size_bytes
    seconds = 0.0
    by_price = sorted(freeable.items(), key=lambda item: cost.op_seconds[item[0]] / item[1])
    for position, size in by_price:
        if excess <= 0:
            break
        seconds += cost.op_seconds[position] * min(1.0, excess / size)
        excess -= size
    return seconds
