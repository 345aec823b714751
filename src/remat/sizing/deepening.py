"""A trace of a deeper model from those of two shallow ones: layers that are alike run alike.

NOTE [ One layer more ]
Between the starts of two consecutive layers that are alike lies one period of the forward, and
between the first reads of what they saved one period of the backward. A deeper model's trace is
that of a shallow one with both periods of a middle layer put in again. A copy of the layer has
copies of all that is made in the two periods and of its parameters, gradients and state; what it
reads or frees of the layers before and after it belongs to their copies. What is the same for all
layers stays, and grows as it does from one shallow trace to the next. The trace of one layer more
is made in this way as well, and every field of it must be that of its own trace: else none is.
"""

from __future__ import annotations

import copy
import dataclasses
from bisect import bisect_right
from itertools import groupby
from typing import TypeVar

from remat.sizing.layers import SHALLOW, DiffersError, Periods, find_layers
from remat.trace.records import (
    BASE_KINDS,
    OPTIMIZER,
    Call,
    Handle,
    Leaves,
    Op,
    StepTrace,
    Storage,
)

__all__ = ["SHALLOW", "deepen"]

_T = TypeVar("_T")


def deepen(shallow: StepTrace, deeper: StepTrace, more: int) -> StepTrace | None:
    """Return the trace with so many `more` layers than `shallow`; `deeper` is one with one more.

    `None` where the two do not show that all further layers would be alike. See
    NOTE [ One layer more ]. Linear in the size of the result.
    """
    layers = find_layers(shallow)
    if layers is None:
        return None
    try:
        periods = Periods(shallow, layers)
    except DiffersError:
        return None
    one_more = _Stretch(periods, 1)
    if not _is_alike(one_more.trace(), deeper):
        return None
    stretch = _Stretch(periods, more)
    made = stretch.trace()
    _grow_shared(made, stretch, one_more, deeper)
    return made


class _Stretch:
    """One trace with the middle one of five layers put in `times` more times."""

    def __init__(self, periods: Periods, times: int) -> None:
        self._at, self._times = periods, times
        self._trace, self._layers = periods.trace, periods.layers
        points = [(periods.starts[3], periods.forward), (periods.reads[2], periods.backward)]
        points += [(stop, stop - start) for start, stop in periods.middle_runs]
        self._points = sorted(points)
        self._place, self._copies, self._storages = self._numbered()

    def _numbered(self) -> tuple[dict[int, int], dict[int, list[int]], list[tuple[int, int]]]:
        """Number storages anew: where each goes, its copies, and (storage, copy) in order."""
        order: list[tuple[int, int]] = []
        storages = self._trace.storages

        def run_of(number: int) -> tuple[int, bool, int]:
            birth = storages[number].birth
            is_backward = self._at.reads[3] <= birth < self._at.reads[0]
            owner = self._at.owner.get(number, 0)
            if birth < self._trace.phase_start[OPTIMIZER]:
                return owner, is_backward, 0
            # What one op makes for each parameter is one run, else what a run of ops makes.
            starts = (start for start, stop in self._at.middle_runs if start <= birth < stop)
            return owner, is_backward, next(starts, birth)

        for (owner, is_backward, _), group in groupby(range(len(storages)), key=run_of):
            numbers = list(group)
            copies = range(1, self._times + 1) if owner == 2 else range(0)
            if is_backward:
                order += [(number, j) for j in reversed(copies) for number in numbers]
            order += [(number, 0) for number in numbers]
            if not is_backward:
                order += [(number, j) for j in copies for number in numbers]
        place: dict[int, int] = {}
        copied: dict[int, list[int]] = {}
        for position, (number, j) in enumerate(order):
            if j == 0:
                place[number] = position
            if self._at.owner.get(number) == 2:
                copied.setdefault(number, [0] * (self._times + 1))[j] = position
        return place, copied, order

    # -- putting the layer in ---------------------------------------------------------------------

    def trace(self) -> StepTrace:
        """Return the deeper trace."""
        trace, layers = self._trace, self._layers
        made = dataclasses.replace(
            trace,
            ops=self._ops(),
            storages=[self._storage(number, j) for number, j in self._storages],
            handles=self._handles(),
            calls=self._calls(),
            replayed_ticks=[self._moved(tick) for tick in trace.replayed_ticks],
            num_ticks=self._moved(trace.num_ticks),
            phase_start={phase: self._moved(tick) for phase, tick in trace.phase_start.items()},
            handover=None,
        )
        for field in ("buffer_names", "parameter_names"):
            names: dict[int, tuple[str, ...]] = {}
            for position, (number, j) in enumerate(self._storages):
                if number in getattr(trace, field):
                    old = getattr(trace, field)[number]
                    names[position] = tuple(layers.renamed(n, self._renumber(n, j)) for n in old)
            setattr(made, field, names)
        return made

    def _renumber(self, name: str, j: int) -> int:
        layer = self._layers.number_in(name)
        return self._times if layer is not None and layer > 2 else j

    def _moved(self, tick: int) -> int:
        """Return where a tick is that belongs to no copy."""
        return tick + self._times * sum(length for point, length in self._points if point <= tick)

    def _tick(self, tick: int, layer: int | None, j: int) -> int:
        """Return where a tick is for what belongs to a layer, or its j-th copy."""
        if layer is None:
            return self._moved(tick)
        shift = self._times if layer == 3 else j
        if self._at.starts[1] <= tick < self._at.starts[4]:
            return tick + shift * self._at.forward
        if self._at.reads[3] <= tick < self._at.reads[0]:
            everything = self._times * (self._at.forward + self._at.backward)
            return tick + everything - shift * self._at.backward
        for start, stop in self._at.middle_runs:
            # Names in a loop over parameters are held into the next one's turn.
            if layer == 2 and start <= tick < 2 * stop - start:
                return self._moved(start) + j * (stop - start) + tick - start
        return self._moved(tick)

    def _seen(self, number: int, layer: int | None, j: int) -> int:
        """Return which storage something that belongs to a layer, or to its copy, means."""
        owner = self._at.owner.get(number)
        if layer is None or owner is None:
            return self._place[number]
        index = (self._times + 1 if layer == 3 else layer - 2 + j) + owner - layer
        twin = self._at.twin[number]
        if 1 <= index <= self._times:
            return self._copies[twin[2]][index]
        return self._place[twin[2 + index if index < 1 else 2 + index - self._times]]

    def _call(self, number: int, j: int) -> int:
        """Return where a call is, or the j-th copy of one of the middle layer."""
        first, stop = self._layers.calls[2], self._layers.calls[3]
        if number < first:
            return number
        return number + self._at.num_calls * (self._times if number >= stop else j)

    def _storage(self, number: int, j: int) -> Storage:
        made = copy.copy(self._trace.storages[number])
        owner = self._at.owner.get(number)
        if made.kind in BASE_KINDS:
            owner = None
        made.birth = self._tick(made.birth, owner, j) if made.birth else 0
        made.call = self._call(made.call, j)
        made.intervals = [
            (self._tick(a, owner, j), self._tick(b, owner, j)) for a, b in made.intervals
        ]
        return made

    def _handles(self) -> list[Handle]:
        before, middle, after = self._cut(
            [h.pack for h in self._trace.handles], self._trace.handles
        )
        made = [self._handle(handle, 0) for handle in before]
        made += [self._handle(h, j) for j in range(1, self._times + 1) for h in middle]
        return [*made, *(self._handle(handle, 0) for handle in after)]

    def _cut(self, ticks: list[int], items: list[_T]) -> tuple[list[_T], list[_T], list[_T]]:
        """Cut what lies in the forward, by tick: up to the third layer, that layer, the rest."""
        first = bisect_right(ticks, self._at.starts[2] - 1)
        stop = bisect_right(ticks, self._at.starts[3] - 1)
        return items[:stop], items[first:stop], items[stop:]

    def _handle(self, handle: Handle, j: int) -> Handle:
        layer = self._at.layer_at(handle.pack)
        return Handle(
            storage=self._seen(handle.storage, layer, j),
            call=self._call(handle.call, j),
            pack=self._tick(handle.pack, layer, j),
            unpack=self._tick(handle.unpack, layer, j) if handle.unpack >= 0 else -1,
            end=self._tick(handle.end, layer, j) if handle.end >= 0 else -1,
            ops_before=self._op_position(handle.ops_before, layer, j),
        )

    def _op_position(self, position: int, layer: int | None, j: int) -> int:
        """Return where an op of the forward is, by its position among all ops."""
        if layer is None:
            is_behind = position >= self._trace.calls[self._layers.calls[3]].first_op
            return position + self._at.num_ops * (self._times if is_behind else 0)
        return position + self._at.num_ops * (self._times if layer == 3 else j)

    def _calls(self) -> list[Call]:
        calls = self._trace.calls
        before, middle, after = self._cut([call.start for call in calls], calls)
        made = [self._one_call(call, 0) for call in before]
        made += [self._one_call(c, j) for j in range(1, self._times + 1) for c in middle]
        return [*made, *(self._one_call(call, 0) for call in after)]

    def _one_call(self, call: Call, j: int) -> Call:
        layer = self._at.layer_at(call.start)
        return dataclasses.replace(
            call,
            module=self._layers.renamed(call.module, self._renumber(call.module, j)),
            parent=self._call(call.parent, j),
            start=self._tick(call.start, layer, j),
            end=self._tick(call.end, layer, j) if call.end >= 0 else -1,
            entered=self._tick(call.entered, layer, j) if call.entered >= 0 else -1,
            first_op=self._op_position(call.first_op, layer, j),
            stop_op=self._op_position(call.stop_op, layer, j) if call.stop_op >= 0 else -1,
            inputs=tuple(self._seen(s, layer, j) for s in call.inputs),
            outputs=tuple(self._seen(s, layer, j) for s in call.outputs),
            arguments=self._leaves(call.arguments, layer, j),
            results=self._leaves(call.results, layer, j),
        )

    def _leaves(self, leaves: Leaves, layer: int | None, j: int) -> Leaves:
        # Objects named before all layers are the same for all.
        last = self._at.names[2] if layer is None else self._at.names[0]
        shift = self._at.num_names * (j if layer in (1, 2) else self._times)
        return dataclasses.replace(
            leaves,
            names=tuple(n + shift if isinstance(n, int) and n > last else n for n in leaves.names),
            storages=tuple(self._seen(s, layer, j) for s in leaves.storages),
        )

    def _ops(self) -> list[Op]:
        made: list[Op] = []
        runs = [
            (self._at.starts[2], self._at.starts[3], 1),
            (self._at.reads[2], self._at.reads[1], -1),
        ]
        runs += [(start, stop, 1) for start, stop in self._at.middle_runs]
        ops = self._trace.ops
        ticks = [op.tick for op in ops]
        done = 0
        for start, stop, sign in sorted(runs):
            first, last = (bisect_right(ticks, tick - 1) for tick in (start, stop))
            made += [self._op(op, 0) for op in ops[done : first if sign < 0 else last]]
            copies = range(1, self._times + 1)
            for j in reversed(copies) if sign < 0 else copies:
                made += [self._op(op, j) for op in ops[first:last]]
            done = first if sign < 0 else last
        return [*made, *(self._op(op, 0) for op in ops[done:])]

    def _op(self, op: Op, j: int) -> Op:
        layer = self._at.layer_at(op.tick)
        if layer is None and op.tick >= self._trace.phase_start[OPTIMIZER]:
            if j == 0 and not any(start <= op.tick < stop for start, stop in self._at.middle_runs):
                return self._op_of_all(op)
            layer = 2
        return self._op_with(
            op, self._tick(op.tick, layer, j),
            *(tuple(self._seen(s, layer, j) for s in n) for n in (op.inputs, op.fresh, op.mutated)),
            call=self._call(op.call, j),
        )  # fmt: skip

    def _op_of_all(self, op: Op) -> Op:
        """Return an op of the optimizer with the copies of what it takes of the middle layer."""

        def spread(numbers: tuple[int, ...]) -> tuple[int, ...]:
            found: list[int] = []
            for owner, group in groupby(numbers, key=self._at.owner.get):
                run = list(group)
                found += [self._place[number] for number in run]
                if owner == 2:
                    copies = range(1, self._times + 1)
                    found += [self._copies[number][j] for j in copies for number in run]
            return tuple(found)

        return self._op_with(
            op, self._moved(op.tick), spread(op.inputs), spread(op.fresh), spread(op.mutated),
            call=self._call(op.call, 0),
        )  # fmt: skip

    @staticmethod
    def _op_with(
        op: Op,
        tick: int,
        inputs: tuple[int, ...],
        fresh: tuple[int, ...],
        mutated: tuple[int, ...],
        *,
        call: int,
    ) -> Op:
        # Several times as fast as `dataclasses.replace`, for tens of thousands of ops.
        return Op(
            tick, op.name, op.signature, call, op.phase, op.flops, op.moved_bytes, inputs, fresh,
            mutated, op.is_random, op.dtype,
        )  # fmt: skip

    # -- what all layers share --------------------------------------------------------------------

    def shared_storages(self) -> dict[int, int]:
        """Return where each storage is that belongs to no layer."""
        return {number: at for number, at in self._place.items() if number not in self._at.owner}

    def shared_ticks(self) -> dict[int, int]:
        """Return where each op is that belongs to no layer, by its tick before."""
        return {
            op.tick: self._moved(op.tick)
            for op in self._trace.ops
            if self._at.layer_at(op.tick) is None
            and not any(start <= op.tick < stop for start, stop in self._at.middle_runs)
        }

    @property
    def times(self) -> int:
        """How many layers are put in."""
        return self._times


def _is_alike(made: StepTrace, real: StepTrace) -> bool:
    """Whether a trace that was made is the real one but for the sizes of what all layers share."""

    def ops(trace: StepTrace) -> list[tuple[object, ...]]:
        return [
            (op.tick, op.name, op.signature, op.call, op.phase, op.inputs, op.fresh, op.mutated)
            for op in trace.ops
        ]

    def storages(trace: StepTrace) -> list[tuple[object, ...]]:
        return [(s.kind, s.birth, s.call, s.intervals) for s in trace.storages]

    return (
        made.num_ticks == real.num_ticks
        and made.replayed_ticks == real.replayed_ticks
        and made.phase_start == real.phase_start
        and made.handles == real.handles
        and made.calls == real.calls
        and made.parameter_names == real.parameter_names
        and made.buffer_names == real.buffer_names
        and ops(made) == ops(real)
        and storages(made) == storages(real)
    )


def _grow_shared(made: StepTrace, stretch: _Stretch, one_more: _Stretch, deeper: StepTrace) -> None:
    """Let bytes and FLOPs that belong to no layer grow as they do from one layer to the next."""
    more = stretch.times - 1
    before = one_more.shared_storages()
    for number, at in stretch.shared_storages().items():
        shallow_bytes, bytes_now = made.storages[at].size_bytes, deeper.storages[before[number]]
        grown = bytes_now.size_bytes - shallow_bytes
        made.storages[at].size_bytes = bytes_now.size_bytes + more * grown
    here = {op.tick: position for position, op in enumerate(made.ops)}
    there = {op.tick: op for op in deeper.ops}
    next_ticks = one_more.shared_ticks()
    for tick, now in stretch.shared_ticks().items():
        op, real = made.ops[here[now]], there[next_ticks[tick]]
        if (op.flops, op.moved_bytes) != (real.flops, real.moved_bytes):
            made.ops[here[now]] = dataclasses.replace(
                op,
                flops=real.flops + more * (real.flops - op.flops),
                moved_bytes=real.moved_bytes + more * (real.moved_bytes - op.moved_bytes),
            )
