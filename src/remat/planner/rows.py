"""Rows: memory at one tick as a linear expression of the decisions.

NOTE [ Alive as an expression ]
Decisions x are 0 or 1, and at most one option is chosen among those that contain a call. A storage
that only saved tensors and regions hold is alive at a tick if any holder holds it:
- a tensor saved inside options A that are all dropped at the tick holds it as 1 - sum(x[a]);
- a region r that keeps it, as its input or as the result of a saved op, holds it as x[r].
If r is in A, the two together are 1 - sum(x[a] for a in A without r), because at most one of A is
chosen. Several expressions that remain are joined by a variable z >= each of them, and a storage
counts once however many hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from remat.planner.options import Option
from remat.planner.timeline import Timeline
from remat.trace.records import BASE_KINDS


@dataclass(frozen=True, slots=True)
class Linear:
    """constant + sum(coefficient * x[option]), with every coefficient +1 or -1."""

    constant: int
    plus: frozenset[int] = frozenset()
    minus: frozenset[int] = frozenset()


@dataclass(slots=True)
class Row:
    """Bytes at one tick: constant + sum(bytes * x) + sum(bytes * z), z the joins of expressions.

    They must stay within the budget of the device, or within `limit_bytes` where it is given.
    """

    tick: int
    constant: int
    limit_bytes: int | None = None
    coefficients: dict[int, int] = field(default_factory=dict)
    joins: dict[frozenset[Linear], int] = field(default_factory=dict)

    def add(self, position: int, size: int) -> None:
        """Add bytes that are there if an option is chosen."""
        self.coefficients[position] = self.coefficients.get(position, 0) + size

    def add_linear(self, expression: Linear, size: int) -> None:
        """Add bytes times an expression."""
        self.constant += expression.constant * size
        for position in expression.plus:
            self.add(position, size)
        for position in expression.minus:
            self.add(position, -size)


# Stands for the tick of the row of host memory, which is fullest at the end of the forward.
HOST_TICK = -1


def host_row(options: Iterable[Option], limit_bytes: int) -> Row:
    """Write the bytes that options keep in host memory, all of it alive at the forward's end."""
    row = Row(HOST_TICK, 0, limit_bytes)
    for position, option in enumerate(options):
        if option.host_bytes:
            row.add(position, option.host_bytes)
    return row


class RowBuilder:
    """Write the memory at any tick as a row; see NOTE [ Alive as an expression ]."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.options = timeline.options
        storages = timeline.trace.storages
        self._numbers = np.array(
            [i for i, s in enumerate(storages) if s.kind not in BASE_KINDS], dtype=np.int64
        )
        spans = [self._span(int(i)) for i in self._numbers]
        self._first = np.array([a for a, _ in spans], dtype=np.int64)
        self._last = np.array([b for _, b in spans], dtype=np.int64)

    def row(self, tick: int) -> Row:
        """Return the row of a tick; at a recomputation, with the working set of what runs then."""
        timeline = self.timeline
        row = Row(tick, timeline.base_bytes + int(timeline.workspace[tick]))
        for number in self._numbers[(self._first <= tick) & (tick <= self._last)]:
            self._add_storage(row, int(number))
        for position, option in enumerate(self.options):
            for first, last, size in option.kept:
                if first <= tick <= last:
                    row.add(position, size)
            replayed = max((size for at, size in option.replays if at == tick), default=0)
            if replayed:
                row.add(position, replayed)
        return row

    def _span(self, storage: int) -> tuple[int, int]:
        """Return the ticks between which a storage may be alive under any plan."""
        record = self.timeline.trace.storages[storage]
        ends = [end for _, end in record.intervals]
        ends += [
            self.timeline.trace.handles[n].end for n in self.timeline.handles_of.get(storage, ())
        ]
        ends += [last for _, _, last in self.timeline.holders.get(storage, ())]
        ends += [last for _, _, _, last in self.timeline.inner.get(storage, ())]
        return record.birth, max(ends, default=record.birth)

    def _add_storage(self, row: Row, storage: int) -> None:
        tick, size = row.tick, self.timeline.trace.storages[storage].size_bytes
        record = self.timeline.trace.storages[storage]
        held_naturally = any(start <= tick <= end for start, end in record.intervals)
        saved: set[frozenset[int]] = set()
        copies = {
            (position, part)
            for position, part, first, last in self.timeline.inner.get(storage, ())
            if first <= tick <= last
        }
        for number in self.timeline.handles_of.get(storage, ()):
            handle = self.timeline.trace.handles[number]
            if not handle.pack <= tick <= handle.end:
                continue
            dropped = []
            for position in self.timeline.around(handle.call):
                back_at, part = self.options[position].returns(number, storage)
                if part >= 0 or tick <= back_at:
                    dropped.append(position)
                if part >= 0 and tick > back_at:
                    copies.add((position, part))
            saved.add(frozenset(dropped))
        for position, _ in copies:
            row.add(position, size)
        if held_naturally:
            row.constant += size
            return
        readers = {
            p for p, first, last in self.timeline.holders.get(storage, ()) if first <= tick <= last
        }
        expressions = self._simplify(saved, readers)
        if len(expressions) == 1:
            row.add_linear(expressions[0], size)
        elif expressions:
            key = frozenset(expressions)
            row.joins[key] = row.joins.get(key, 0) + size

    def _simplify(self, saved: set[frozenset[int]], readers: set[int]) -> list[Linear]:
        absorbed = {r for r in readers for dropped in saved if r in dropped}
        saved = {dropped - readers for dropped in saved}
        if frozenset() in saved:
            return [Linear(1)]
        minimal = [d for d in saved if not any(other < d for other in saved)]
        expressions = [Linear(1, minus=dropped) for dropped in minimal]
        return expressions + [
            Linear(0, plus=frozenset(chain)) for chain in self._chains(readers - absorbed)
        ]

    def _chains(self, positions: Iterable[int]) -> list[list[int]]:
        """Group options that contain one another: at most one of a chain is chosen."""
        chains: list[list[int]] = []
        for position in sorted(positions):
            for chain in chains:
                if all(self.options[position].excludes(self.options[other]) for other in chain):
                    chain.append(position)
                    break
            else:
                chains.append([position])
        return chains
