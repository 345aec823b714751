"""Layers of a trace that are alike: which calls they are, where their periods lie, what is theirs.

See NOTE [ One layer more ] in `remat.sizing.deepening`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby, pairwise

from remat.planner.blocks import find_blocks, structure_of
from remat.trace.records import OPTIMIZER, OPTIMIZER_STATE, StepTrace

# Layers of the shallow traces: a layer is copied that has two alike before and after it, as the
# first and the last may differ in what is around them.
SHALLOW = 5


class DiffersError(Exception):
    """The layers of a trace are not alike."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Consecutive calls that are alike, and their modules' common name, with {} for the number."""

    calls: tuple[int, ...]
    pattern: str
    first: int

    def number_in(self, name: str) -> int | None:
        """Return which layer a module or parameter belongs to, if any."""
        before, _, after = self.pattern.partition("{}")
        found = re.match(re.escape(before) + r"(\d+)" + re.escape(after) + r"(\.|$)", name)
        return int(found[1]) - self.first if found else None

    def renamed(self, name: str, by: int) -> str:
        """Return a name with the number of its layer changed."""
        number = self.number_in(name)
        if number is None or not by:
            return name
        old = self.pattern.format(number + self.first)
        return self.pattern.format(number + self.first + by) + name[len(old) :]


def find_layers(trace: StepTrace) -> Layers | None:
    """Find the longest stretch of blocks that are alike and numbered one after another."""
    best: tuple[int, ...] = ()
    for _, group in groupby(find_blocks(trace), key=lambda call: structure_of(trace, call)):
        found = tuple(group)
        best = max(best, found, key=len)
    if len(best) < SHALLOW:
        return None
    best = best[-SHALLOW:]
    parts = [trace.calls[call].module.split(".") for call in best]
    for place, text in enumerate(parts[0]):
        if text.isdecimal():
            numbers = [int(text) + layer for layer in range(len(best))]
            pattern = [*parts[0][:place], "{}", *parts[0][place + 1 :]]
            if parts == [".".join(pattern).format(number).split(".") for number in numbers]:
                return Layers(best, ".".join(pattern), numbers[0])
    return None


class Periods:
    """Where the forward and the backward of five layers that are alike lie in a trace.

    Arguments of what is found: layers are numbered from 0; `starts` and `reads` are the ticks at
    which each begins, and at which backward first reads what it saved, `forward` and `backward` the
    ticks from one to the next. `owner` says whose a storage is, of the layers 1, 2 and 3, and
    `twin` what stands in its place in each of them. `middle_runs` are the optimizer's ticks that
    concern layer 2 alone.

    Raises
    ------
    DiffersError: if the layers are not alike after all.
    """

    def __init__(self, trace: StepTrace, layers: Layers) -> None:
        self.trace, self.layers = trace, layers
        calls = [trace.calls[number] for number in layers.calls]
        self.starts = [call.start for call in calls]
        self.reads = self._first_reads()
        self.forward = self._period(self.starts[1:], 1)
        self.backward = self._period(self.reads[:4], -1)
        self.num_ops = calls[3].first_op - calls[2].first_op
        self.num_calls = layers.calls[3] - layers.calls[2]
        self.names = self._last_names()
        self.num_names = self.names[2] - self.names[1]
        self.owner = self._owners()
        self.middle_runs = self._optimizer_runs()
        self.twin = self._twins()

    # -- where periods lie ------------------------------------------------------------------------

    def _first_reads(self) -> list[int]:
        """Return when backward first reads what each layer saved."""
        stops = [*self.starts[1:], self.trace.calls[self.layers.calls[-1]].end + 1]
        found = []
        for start, stop in zip(self.starts, stops, strict=True):
            reads = [h.unpack for h in self.trace.handles if start <= h.pack < stop]
            found.append(min((tick for tick in reads if tick >= 0), default=-1))
        return found

    @staticmethod
    def _period(ticks: list[int], sign: int) -> int:
        apart = {sign * (after - before) for before, after in pairwise(ticks)}
        if len(apart) != 1 or min(apart) <= 0 or min(ticks) < 0:
            raise DiffersError
        return apart.pop()

    def layer_at(self, tick: int) -> int | None:
        """Return the layer 1, 2 or 3 in whose periods a tick lies."""
        if self.starts[1] <= tick < self.starts[4]:
            return 1 + (tick - self.starts[1]) // self.forward
        if self.reads[3] <= tick < self.reads[0]:
            return 3 - (tick - self.reads[3]) // self.backward
        return None

    def _last_names(self) -> list[int]:
        """Return the last name that was given to an object by the end of each layer."""
        found = []
        for layer in range(4):
            inside = self.trace.calls[self.layers.calls[layer] : self.layers.calls[layer + 1]]
            names = [n for c in inside for n in (*c.arguments.names, *c.results.names)]
            found.append(max((n for n in names if isinstance(n, int)), default=0))
        if len({after - before for before, after in pairwise(found)}) != 1:
            raise DiffersError
        return found

    # -- whose storages are -----------------------------------------------------------------------

    def _owners(self) -> dict[int, int]:
        """Return the layer 1, 2 or 3 of each storage that one of them makes or has for itself."""
        trace = self.trace
        named = {**trace.buffer_names, **trace.parameter_names}
        found: dict[int, int] = {}
        for number, storage in enumerate(trace.storages):
            layer = self.layer_at(storage.birth) if storage.birth else None
            if number in named:
                layers = {self.layers.number_in(name) for name in named[number]}
                layer = layers.pop() if len(layers) == 1 else None
            if layer in (1, 2, 3):
                found[number] = layer
        trained = sorted(trace.parameter_names)
        state = [n for n, s in enumerate(trace.storages) if s.kind == OPTIMIZER_STATE]
        lists = [state]
        begin = trace.phase_start[OPTIMIZER]
        lists += [list(op.fresh) for op in trace.ops if op.tick >= begin and len(op.fresh) > 1]
        for numbers in lists:  # as many of each parameter, one parameter after another
            each, rest = divmod(len(numbers), len(trained))
            if rest == 0:
                for position, number in enumerate(numbers):
                    owner = found.get(trained[position // each])
                    if owner is not None:
                        found[number] = owner
        for op in trace.ops:  # what is made on the way to one parameter's update
            owners = {found.get(number) for number in (*op.inputs, *op.mutated)}
            if op.tick >= begin and len(owners) == 1 and (owner := owners.pop()) is not None:
                found.update(dict.fromkeys(op.fresh, owner))
        return found

    def _optimizer_runs(self) -> list[tuple[int, int]]:
        """Return stretches of the optimizer's ticks that concern the middle layer alone."""
        begin = self.trace.phase_start[OPTIMIZER]
        runs: list[tuple[int, int]] = []
        for op in self.trace.ops:
            touched = {self.owner.get(s) for s in (*op.inputs, *op.fresh, *op.mutated)}
            if op.tick < begin or touched != {2}:
                continue
            if runs and runs[-1][1] == op.tick:
                runs[-1] = (runs[-1][0], op.tick + 1)
            else:
                runs.append((op.tick, op.tick + 1))
        return runs

    def _twins(self) -> dict[int, dict[int, int]]:
        """Return what stands in layers 1, 2 and 3 for each of their storages."""
        of_layer: dict[int, list[int]] = {1: [], 2: [], 3: []}
        for number in sorted(self.owner):
            of_layer[self.owner[number]].append(number)
        kinds = {
            tuple((self.trace.storages[n].kind, self.trace.storages[n].size_bytes) for n in found)
            for found in of_layer.values()
        }
        if len(kinds) != 1:
            raise DiffersError
        twins: dict[int, dict[int, int]] = {}
        for trio in zip(of_layer[1], of_layer[2], of_layer[3], strict=True):
            for number in trio:
                twins[number] = dict(zip((1, 2, 3), trio, strict=True))
        return twins
