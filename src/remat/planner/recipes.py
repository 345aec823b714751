"""Recipes: how a forward op's results come about, and whether they can be made again alone.

NOTE [ Recipes ]
A recipe is an op and those that write to its results afterwards (an activation in place, the mask
of a dropout). It gives the same values again, whatever happened since, if
1. nothing but the recipe writes to its results, and it writes to nothing else but buffers, of which
   a copy from before is kept (the statistics of a batch norm);
2. what it reads is not written to later, before the optimizer steps;
3. where it draws random numbers, the random state from before is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from remat.planner.options import RNG_STATE_BYTES
from remat.planner.spans import Facts
from remat.trace.records import EMPTY_OPS, FORWARD

# Run again, where no gradients are recorded, these would not make what backward needs of them.
_NOT_ALONE = frozenset({"aten.mkldnn_rnn_layer.default"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Ops (their positions) that make `results` from `sources`, by storage.

    `kept_bytes` are what copies of buffers and random states take from the tick `kept_from` until
    it runs again; `seconds` are those of running it again, `overhead_seconds` those of bookkeeping.
    """

    ops: tuple[int, ...]
    results: tuple[int, ...]
    sources: tuple[int, ...]
    kept_from: int
    kept_bytes: int
    draws: bool
    size_bytes: int
    workspace_bytes: int
    seconds: float
    overhead_seconds: float

    @property
    def first(self) -> int:
        """The op that makes the results."""
        return self.ops[0]

    @property
    def last(self) -> int:
        """The op after which they are as they stay."""
        return self.ops[-1]

    @property
    def key(self) -> int:
        """Its name among all that brings results back."""
        return self.last


def find_recipes(facts: Facts) -> dict[int, Recipe]:
    """Return the recipes of a forward that can be followed again, by the position of their last op.

    See NOTE [ Recipes ]. Linear in the ops.
    """
    trace = facts.trace
    makers = {s: p for p, op in enumerate(trace.ops) if op.phase == FORWARD for s in op.fresh}
    members: dict[int, list[int]] = {p: [p] for p in dict.fromkeys(makers.values())}
    spoiled: set[int] = set()
    for position, op in enumerate(trace.ops):
        hosts = {makers[s] for s in op.mutated if s in makers}
        for host in hosts:
            if host == position:
                continue
            if op.phase != FORWARD or op.fresh or len(hosts) > 1:
                spoiled.add(host)
            else:
                members[host].append(position)
    found = {}
    for host, ops in members.items():
        if host not in spoiled:
            recipe = _recipe(facts, ops)
            if recipe is not None:
                found[recipe.last] = recipe
    return found


def _recipe(facts: Facts, positions: list[int]) -> Recipe | None:
    trace = facts.trace
    ops = [trace.ops[p] for p in positions]
    results = ops[0].fresh
    buffers = {s for op in ops for s in op.mutated if s not in results}
    if not buffers <= trace.buffer_names.keys() or ops[0].name in _NOT_ALONE:
        return None
    if trace.chooses(ops[0]):  # made again, it might choose otherwise
        return None
    step_end = trace.phase_start.get("optimizer", trace.num_ticks)
    for op in ops:
        for s in () if op.name in EMPTY_OPS else op.inputs:
            if s in results or s in buffers:
                continue
            if any(op.tick < tick < step_end for tick in facts.writes.get(s, ())):
                return None
    sizes = [trace.storages[s].size_bytes for s in results]
    kept = sum(trace.storages[s].size_bytes for s in buffers)
    return Recipe(
        ops=tuple(positions),
        results=results,
        sources=_unique(
            s
            for op in ops
            if op.name not in EMPTY_OPS
            for s in op.inputs
            if s not in results and s not in buffers
        ),
        kept_from=ops[0].tick,
        draws=any(op.is_random for op in ops),
        kept_bytes=kept + RNG_STATE_BYTES * sum(op.is_random for op in ops),
        size_bytes=sum(sizes),
        workspace_bytes=max(facts.cost.op_workspace[p] for p in positions),
        seconds=sum(facts.cost.op_seconds[p] for p in positions),
        overhead_seconds=facts.cost.bookkeeping.dropped_op * len(positions),
    )


def _unique(storages: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(storages))
