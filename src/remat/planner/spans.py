"""Spans: stretches of a step's forward that may run again, and whether they may."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass

from remat.cost.model import StepCost
from remat.trace.records import (
    BASE_KINDS,
    BATCH,
    EMPTY_OPS,
    FORWARD,
    WRAPPED_KINDS,
    Op,
    StepTrace,
)

# A recomputation of these would not give the same values.
_NOT_REPLAYABLE = {
    "aten.rrelu_with_noise": "RReLU's noise is filled in place and lost under saved-tensor hooks "
    "(pytorch#193671)",
    "aten.rrelu_with_noise_": "RReLU's noise is filled in place and lost under saved-tensor hooks "
    "(pytorch#193671)",
}


@dataclass(frozen=True, slots=True)
class Span:
    """A module call, or a run of sibling calls, as a region; `children` are regions inside it.

    In a run, each call is given what the one before it returned (see `remat.planner.chains`).
    Children lie in order, apart from one another, and are spans of calls inside this one's, or of
    some of its own calls.
    """

    calls: tuple[int, ...]
    children: tuple[Span, ...] = ()


class Facts:
    """Where the ops, saved tensors and storages of a trace's calls lie, and what ops cost."""

    def __init__(self, trace: StepTrace, cost: StepCost) -> None:
        self.trace = trace
        self.cost = cost
        self.op_ticks = [op.tick for op in trace.ops]
        self.writes: dict[int, list[int]] = {}
        for op in trace.ops:
            for storage in op.mutated:
                self.writes.setdefault(storage, []).append(op.tick)
        self._packs = [h.pack for h in trace.handles]
        self._births = [s.birth for s in trace.storages]
        self._cost_until = [0.0]
        for seconds in cost.op_seconds:
            self._cost_until.append(self._cost_until[-1] + seconds)
        self.calls_of = Counter(call.module for call in trace.calls if call.phase == FORWARD)
        self._batch = frozenset(
            s for s, record in enumerate(trace.storages) if record.kind == BATCH
        )
        self._varying = _varying(trace, self._batch)

    def ticks(self, span: Span) -> tuple[int, int]:
        """Return the first and last tick of a span's forward."""
        return self.trace.calls[span.calls[0]].start, self.trace.calls[span.calls[-1]].end

    def ops(self, span: Span) -> tuple[int, int]:
        """Return which ops a span makes, as first and stop position."""
        return self.trace.calls[span.calls[0]].first_op, self.trace.calls[span.calls[-1]].stop_op

    def handles(self, span: Span) -> tuple[int, int]:
        """Return which tensors are saved inside a span, as first and stop position."""
        start, end = self.ticks(span)
        return bisect_left(self._packs, start), bisect_right(self._packs, end)

    def storages(self, span: Span) -> tuple[int, int]:
        """Return which storages are made inside a span, as first and stop position."""
        start, end = self.ticks(span)
        return bisect_right(self._births, start), bisect_right(self._births, end)

    def inputs(self, span: Span) -> tuple[int, ...]:
        """Return the storages that a span is given."""
        return self.trace.calls[span.calls[0]].inputs

    def seconds(self, first_op: int, stop_op: int) -> float:
        """Return what a stretch of ops costs."""
        return self._cost_until[stop_op] - self._cost_until[first_op]

    def gathers(self, span: Span) -> bool:
        """Whether a span makes processes exchange what FSDP2 has sharded.

        To run it again, every process would have to have planned the same; and what it gathers
        then would stay until each of its parts has been differentiated.
        """
        return any(op.name.startswith("c10d.") for op in self.trace.ops[slice(*self.ops(span))])

    def loses_noise(self, span: Span) -> bool:
        """Whether a span saves a tensor for backward before it fills it, which no hook sees."""
        ops = self.trace.ops[slice(*self.ops(span))]
        return any(op.name.rpartition(".")[0] in _NOT_REPLAYABLE for op in ops)

    def _not_given(self, span: Span) -> frozenset[int]:
        """Return the storages that a span may only read where it is given them.

        Those of the batch may also be inside of what is no tuple, list or mapping.
        """
        given = self.trace.calls[span.calls[0]].arguments
        opaque = {i for i, name in enumerate(given.names) if isinstance(name, int)}
        return self._varying if opaque - {*given.tensors} else self._varying | self._batch

    def refusal(self, span: Span) -> str | None:
        """Say why a span cannot be recomputed, if it cannot."""
        if self.gathers(span):
            return "it gathers sharded parameters, which all processes must do alike; it is kept."
        first, stop = self.storages(span)
        inputs = set(self.inputs(span))
        outside: set[int] = set()
        own: set[int] = set()
        for op in self.trace.ops[slice(*self.ops(span))]:
            schema = op.name.rpartition(".")[0]
            if schema in _NOT_REPLAYABLE:
                return f"{_NOT_REPLAYABLE[schema]}; it is kept."
            if op.is_random and _has_generator(self.trace, op):
                return "it draws from a generator of its own, which is not restored; it is kept."
            for storage in op.mutated:
                if first <= storage < stop:
                    continue
                if storage in inputs:
                    return "it writes to its own input; it is kept."
                if storage not in self.trace.buffer_names:
                    return "it writes to a tensor from outside that is no buffer; it is kept."
                own.add(storage)
            outside.update(s for s in op.inputs if not first <= s < stop)
        for number in span.calls:
            call = self.trace.calls[number]
            if call.changed_state:
                hint = (
                    " Set config.use_cache=False."
                    if "past_key_values" in call.changed_state
                    else ""
                )
                return (
                    f"it changes {call.changed_state}, which would change twice; it is kept.{hint}"
                )
        if not self._not_given(span).isdisjoint(outside - inputs):
            return (
                "it reads a tensor that it is not given, as from an attribute, which may be "
                "another one when it runs again; it is kept. Pass it as an argument."
            )
        release = self.trace.phase_start.get("optimizer", self.trace.num_ticks)
        end = self.ticks(span)[1]
        for storage in (inputs | outside) - own:  # what it updates itself is restored for it
            if any(end < tick < release for tick in self.writes.get(storage, ())):
                return "what it reads is written to later, before backward; it is kept."
        return None


def _varying(trace: StepTrace, batch: frozenset[int]) -> frozenset[int]:
    """List the storages made in the forward whose values follow from the batch, or are drawn.

    What is made of parameters, buffers and constants alone has the same values whenever it is made.
    """
    made: set[int] = set()
    for op in trace.ops:
        if op.phase != FORWARD:
            continue
        read = () if op.name in EMPTY_OPS else op.inputs
        if op.is_random or not made.isdisjoint(read) or not batch.isdisjoint(read):
            made.update(op.fresh, op.mutated)
    return frozenset(s for s in made if trace.storages[s].kind not in BASE_KINDS | WRAPPED_KINDS)


def _has_generator(trace: StepTrace, op: Op) -> bool:
    signature = trace.signatures[op.signature]
    values = (*signature.arguments, *(value for _, value in signature.keywords))
    return any(isinstance(v, str) and v == "<Generator>" for v in values)
