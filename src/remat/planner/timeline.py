"""Timeline: the bytes alive at every tick of a step under any choice of regions.

NOTE [ What a region changes ]
1. The tensors that it saved are not held from when they were packed until `recompute_at`.
2. Its inputs are held from its start until the last of its saved tensors is released; results of
   its saved ops are held from forward until recomputation takes them.
3. At `recompute_at` it runs again: everything alive then, plus its own working set.
4. After that, what it saved is alive as copies, each until its own release.
5. Snapshots of buffers and random state are held as long as its inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remat.cost.model import StepCost
from remat.planner.options import Option
from remat.trace.records import BASE_KINDS, CRUMBS_BYTES, StepTrace

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes alive at each tick, and at the start of each chosen region's recomputation.

    `replays` maps an option's position to the bytes at its recomputation, working set included.
    """

    alive: NDArray[np.int64]
    replays: dict[int, int]

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at any time."""
        return max(int(self.alive.max()), max(self.replays.values(), default=0))


class Timeline:
    """Evaluate choices of options on one trace; rules in NOTE [ What a region changes ]."""

    def __init__(self, trace: StepTrace, cost: StepCost, options: tuple[Option, ...]) -> None:
        self.trace = trace
        self.options = options
        self.base_bytes = trace.base_bytes + CRUMBS_BYTES
        self.handles_of: dict[int, list[int]] = {}
        for number, handle in enumerate(trace.handles):
            if trace.storages[handle.storage].kind not in BASE_KINDS:
                self.handles_of.setdefault(handle.storage, []).append(number)
        # storage -> (option, first tick, last tick) for each option that holds it
        self.holders: dict[int, list[tuple[int, int, int]]] = {}
        by_call: dict[int, tuple[int, ...]] = {}
        for position, option in enumerate(options):
            for storage, first, last in option.holds:
                self.holders.setdefault(storage, []).append((position, first, last))
            by_call[option.call] = (*by_call.get(option.call, ()), position)
        self._around: dict[int, tuple[int, ...]] = {-1: ()}
        for number, call in enumerate(trace.calls):
            self._around[number] = by_call.get(number, ()) + self._around[call.parent]
        self.workspace = np.zeros(trace.num_ticks + 1, dtype=np.int64)
        for op, size in zip(trace.ops, cost.op_workspace, strict=True):
            self.workspace[op.tick] = size
        self._touched = [self._storages_touched(p) for p in range(len(options))]
        self._keep_all = self._changes(range(len(trace.storages)), frozenset())
        self._keep_all_of: dict[int, list[Interval]] = {}

    def around(self, call: int) -> tuple[int, ...]:
        """Return the options that contain a call, innermost first; at most one is chosen."""
        return self._around[call]

    def curve(self, chosen: Collection[int]) -> Curve:
        """Return the bytes alive under the chosen options (positions in `options`)."""
        picked = frozenset(chosen)
        changes = self._keep_all.copy()
        touched: set[int] = set().union(*(self._touched[p] for p in picked))
        for storage in touched:
            size = self.trace.storages[storage].size_bytes
            for start, end in self._keep_all_intervals(storage):
                changes[start] -= size
                changes[end + 1] += size
            self._add(changes, storage, picked)
        for position in picked:
            option = self.options[position]
            changes[option.start] += option.held_bytes
            changes[option.release + 1] -= option.held_bytes
        alive = np.cumsum(changes)[: self.trace.num_ticks] + self.base_bytes
        replays = {
            p: int(alive[self.options[p].recompute_at]) + self.options[p].replay_bytes
            for p in picked
        }
        return Curve(alive + self.workspace[: self.trace.num_ticks], replays)

    def intervals(
        self, storage: int, picked: frozenset[int]
    ) -> tuple[list[Interval], list[Interval]]:
        """Return when a storage, and when copies of it, are alive under a choice."""
        record = self.trace.storages[storage]
        original = list(record.intervals)
        copies: dict[int, Interval] = {}
        for number in self.handles_of.get(storage, ()):
            handle = self.trace.handles[number]
            position = next((p for p in self._around[handle.call] if p in picked), None)
            if position is None:
                original.append((handle.pack, handle.end))
                continue
            option = self.options[position]
            again = (option.recompute_at + 1, handle.end)
            if again[1] < again[0]:
                continue
            if option.owns(storage):
                before = copies.get(position, again)
                copies[position] = (again[0], max(before[1], again[1]))
            else:
                original.append(again)
        original.extend(
            (first, last)
            for position, first, last in self.holders.get(storage, ())
            if position in picked
        )
        return _union(original), list(copies.values())

    def _keep_all_intervals(self, storage: int) -> list[Interval]:
        known = self._keep_all_of.get(storage)
        if known is None:
            known = self._keep_all_of[storage] = self.intervals(storage, frozenset())[0]
        return known

    def _storages_touched(self, position: int) -> frozenset[int]:
        option = self.options[position]
        handles = self.trace.handles[option.first_handle : option.stop_handle]
        inside = {h.storage for h in handles if h.storage in self.handles_of}
        return frozenset(inside | {storage for storage, _, _ in option.holds})

    def _changes(self, storages: Iterable[int], picked: frozenset[int]) -> NDArray[np.int64]:
        changes = np.zeros(self.trace.num_ticks + 2, dtype=np.int64)
        for storage in storages:
            if self.trace.storages[storage].kind not in BASE_KINDS:
                self._add(changes, storage, picked)
        return changes

    def _add(self, changes: NDArray[np.int64], storage: int, picked: frozenset[int]) -> None:
        size = self.trace.storages[storage].size_bytes
        original, copies = self.intervals(storage, picked)
        for start, end in (*original, *copies):
            changes[start] += size
            changes[end + 1] -= size


def _union(intervals: list[Interval]) -> list[Interval]:
    """Merge overlapping intervals."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
