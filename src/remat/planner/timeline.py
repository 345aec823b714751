"""Timeline: the bytes alive at every tick of a step under any choice of regions.

NOTE [ What a region changes ]
1. The tensors that it saved are not held from when they were packed until its recomputation.
2. Its inputs are held from its start until the last of its saved tensors is released.
3. When backward first reads one of them it runs again: everything alive then, plus its own working
   set.
4. After that, what it saved is alive as copies, each until its own release.
5. Snapshots of buffers and random state are held as long as its inputs.
6. A region nested in it holds its own inputs, as copies, from the outer recomputation to its own,
   and what it saved is back after its own.
7. What waits in host memory is not held; the option says from when on a copy is back.
"""

from __future__ import annotations

import copy
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
    """Bytes alive at each tick, and at each recomputation.

    `replays` are (tick, bytes alive while a region runs again, its working set included).
    """

    alive: NDArray[np.int64]
    replays: tuple[tuple[int, int], ...]

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at any time."""
        return max(int(self.alive.max()), max((size for _, size in self.replays), default=0))


class Timeline:
    """Evaluate choices of options on one trace; rules in NOTE [ What a region changes ]."""

    def __init__(self, trace: StepTrace, cost: StepCost, options: tuple[Option, ...]) -> None:
        self.trace = trace
        self.base_bytes = trace.base_bytes + CRUMBS_BYTES
        self.handles_of: dict[int, list[int]] = {}
        for number, handle in enumerate(trace.handles):
            if trace.storages[handle.storage].kind not in BASE_KINDS:
                self.handles_of.setdefault(handle.storage, []).append(number)
        self.workspace = np.zeros(trace.num_ticks + 1, dtype=np.int64)
        for op, size in zip(trace.ops, cost.op_workspace, strict=True):
            self.workspace[op.tick] = size
        self._choose_from(())
        self._keep_all_of: dict[int, list[Interval]] = {}
        self._keep_all = self._changes(range(len(trace.storages)), frozenset())
        self._choose_from(options)

    def with_options(self, options: tuple[Option, ...]) -> Timeline:
        """Return the timeline of the same trace with other options, which costs much less."""
        made = copy.copy(self)
        made._choose_from(options)
        return made

    def _choose_from(self, options: tuple[Option, ...]) -> None:
        self.options = options
        # storage -> (option, first tick, last tick) for each option that holds it
        self.holders: dict[int, list[tuple[int, int, int]]] = {}
        # storage -> (option, part, first tick, last tick) of copies that nested regions hold
        self.inner: dict[int, list[tuple[int, int, int, int]]] = {}
        by_call: dict[int, tuple[int, ...]] = {}
        for position, option in enumerate(options):
            for storage, first, last in option.holds:
                self.holders.setdefault(storage, []).append((position, first, last))
            for storage, part, first, last in option.inner_inputs:
                self.inner.setdefault(storage, []).append((position, part, first, last))
            for call in option.calls:
                by_call[call] = (*by_call.get(call, ()), position)
        self._around: dict[int, tuple[int, ...]] = {-1: ()}
        for number, record in enumerate(self.trace.calls):
            self._around[number] = by_call.get(number, ()) + self._around[record.parent]
        self._touched = [self._storages_touched(p) for p in range(len(options))]

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
            for first, last, size in self.options[position].kept:
                changes[first] += size
                changes[last + 1] -= size
        alive = np.cumsum(changes)[: self.trace.num_ticks] + self.base_bytes
        replays = tuple(
            (tick, int(alive[tick]) + size)
            for position in picked
            for tick, size in self.options[position].replays
        )
        return Curve(alive + self.workspace[: self.trace.num_ticks], replays)

    def intervals(
        self, storage: int, picked: frozenset[int]
    ) -> tuple[list[Interval], list[Interval]]:
        """Return when a storage, and when copies of it, are alive under a choice."""
        record = self.trace.storages[storage]
        original = list(record.intervals)
        copies: dict[tuple[int, int], Interval] = {}

        def add_copy(made_by: tuple[int, int], first: int, last: int) -> None:
            if first <= last:
                before = copies.get(made_by, (first, last))
                copies[made_by] = (min(before[0], first), max(before[1], last))

        for number in self.handles_of.get(storage, ()):
            handle = self.trace.handles[number]
            position = self._owner(handle.call, picked)
            if position is None:
                original.append((handle.pack, handle.end))
                continue
            back_at, part = self.options[position].returns(number, storage)
            if part >= 0:
                add_copy((position, part), back_at + 1, handle.end)
            elif back_at < handle.end:
                original.append((max(back_at + 1, handle.pack), handle.end))
        for position, part, first, last in self.inner.get(storage, ()):
            if position in picked:
                add_copy((position, part), first, last)
        original.extend(
            (first, last)
            for position, first, last in self.holders.get(storage, ())
            if position in picked
        )
        return _union(original), list(copies.values())

    def _owner(self, call: int, picked: frozenset[int]) -> int | None:
        """Return the chosen option that a call lies in, if any."""
        if picked:
            for position in self._around[call]:
                if position in picked:
                    return position
        return None

    def _keep_all_intervals(self, storage: int) -> list[Interval]:
        known = self._keep_all_of.get(storage)
        if known is None:
            known = self._keep_all_of[storage] = self.intervals(storage, frozenset())[0]
        return known

    def _storages_touched(self, position: int) -> frozenset[int]:
        option = self.options[position]
        root = option.parts[0]
        handles = self.trace.handles[root.first_handle : root.stop_handle]
        inside = {h.storage for h in handles if h.storage in self.handles_of}
        held = {storage for storage, _, _ in option.holds}
        return frozenset(inside | held | {storage for storage, *_ in option.inner_inputs})

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
