"""Options: the decisions that a solver chooses from, and what each frees, holds and costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from remat.planner.records import Hazard, Region, SavedOp
from remat.planner.spans import Facts, Span
from remat.trace.records import BASE_KINDS, FORWARD, Op

# Bytes of generator state that checkpointing keeps for each region that draws (CPU: Mersenne
# twister, `torch.get_rng_state().numel()`); fake tensors do not show them.
RNG_STATE_BYTES = 5056

_NO_PART = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One region of an option: the region itself, or one nested in it.

    Its ops `first_op`..`stop_op` run again when backward first reads a tensor saved inside it, at
    tick `back_at`, and stop at the last tensor that anything needs; `release` is when the last of
    these tensors is let go of. `parent` is the position of the part around it, -1 for the first.
    """

    span: Span
    parent: int
    first_op: int
    stop_op: int
    first_handle: int
    stop_handle: int
    first_storage: int
    stop_storage: int
    back_at: int
    release: int
    region: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A module call, or a run of calls, as a region, with the regions nested in it.

    `holds` are (storage, first tick, last tick) of what it keeps alive: its inputs until the last
    of its saved tensors is released.
    `kept` are (first tick, last tick, bytes) of snapshots of buffers and random states. `replays`
    are (tick, bytes): the most that a recomputation holds beside what is alive then.
    `inner_inputs` are (storage, part, first tick, last tick) of copies that nested regions hold as
    their inputs, made again by the recomputation of that part. `away` are the storages that wait in
    host memory, or were dropped by themselves, with the tick from which a copy is back; where an
    option is not `is_recomputed`, all else is held (see `remat.planner.offload` and
    `remat.planner.dropping`).
    """

    call: int
    module: str
    start: int
    end: int
    parts: tuple[Part, ...]
    part_of: tuple[int, ...]
    seconds: float
    overhead_seconds: float
    holds: tuple[tuple[int, int, int], ...]
    kept: tuple[tuple[int, int, int], ...]
    replays: tuple[tuple[int, int], ...]
    inner_inputs: tuple[tuple[int, int, int, int], ...]
    is_recomputed: bool = True
    away: Mapping[int, int] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def calls(self) -> tuple[int, ...]:
        """The calls that run as one region."""
        return self.parts[0].span.calls

    @property
    def dropped_ops(self) -> tuple[SavedOp, ...]:
        """The ops whose results alone are dropped."""
        return self.parts[0].region.dropped_ops

    @property
    def packed_ops(self) -> tuple[SavedOp, ...]:
        """The ops whose results are kept in fewer bits."""
        return self.parts[0].region.packed_ops

    def owner(self, part: int, storage: int) -> int:
        """Return which part makes a storage anew, from a part outwards; -1 if none does."""
        while part >= 0:
            found = self.parts[part]
            if found.first_storage <= storage < found.stop_storage:
                return part
            part = found.parent
        return _NO_PART

    def returns(self, handle: int, storage: int) -> tuple[int, int]:
        """Return after which tick a saved tensor is back, and the part that made it anew or -1.

        A tick of -1 says that it was never dropped.
        """
        if storage in self.away:
            return self.away[storage] - 1, 0
        if not self.is_recomputed:
            return -1, _NO_PART
        part = self.part_of[handle - self.parts[0].first_handle] if self.part_of else 0
        return self.parts[part].back_at, self.owner(part, storage)

    def owns(self, storage: int) -> bool:
        """Whether recomputation makes a storage anew, so that handles come back as copies."""
        return self.owner(0, storage) >= 0

    def excludes(self, other: Option) -> bool:
        """Whether at most one of two options can be chosen: they share a part of the forward."""
        return self.start <= other.end and other.start <= self.end

    def regions(self) -> tuple[Region, ...]:
        """Return the decision as data: the region, then those nested in it."""
        return tuple(part.region for part in self.parts)


@dataclass(frozen=True, slots=True)
class OptionSet:
    """Every option of a trace, in order of their calls, and why other calls are none."""

    options: tuple[Option, ...]
    hazards: tuple[Hazard, ...]


def find_options(
    facts: Facts, *, keep: frozenset[int] = frozenset(), only_kept: bool = False
) -> OptionSet:
    """List the module calls that may be recomputed.

    Calls whose recomputation frees nothing (a linear layer saves its input, which must be held
    anyway) and all but one of calls that save the same tensors are left out, except those in
    `keep`. With `only_kept`, these alone are listed.
    """
    builder = OptionBuilder(facts)
    options: list[Option] = []
    hazards: list[Hazard] = []
    seen: dict[tuple[int, int], int] = {}
    for number, call in enumerate(facts.trace.calls):
        if only_kept and number not in keep:
            continue
        if call.phase != FORWARD or not call.module or not call.uses_grad or call.stop_op < 0:
            continue
        span = Span((number,))
        handles = facts.handles(span)
        if handles[0] == handles[1] or facts.gathers(span):
            continue
        reason = facts.refusal(span)
        if reason is not None:
            hazards.append(Hazard(code="not-replayable", where=call.module, message=reason))
            continue
        option = builder.option(span)
        if option is None:
            continue
        if number not in keep:
            if not builder.drops_anything(option):
                continue
            twin = seen.get(handles)
            if twin is not None:
                if option.seconds < options[twin].seconds:
                    options[twin] = option
                continue
            seen[handles] = len(options)
        options.append(option)
    return OptionSet(tuple(options), tuple(hazards))


class OptionBuilder:
    """Work out what a span would free, hold and cost as a region."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.trace = facts.trace
        self.cost = facts.cost

    def option(self, span: Span) -> Option | None:
        """Describe a span as a region; `None` if backward reads nothing that it saved."""
        parts: list[Part] = []
        self._add_parts(parts, span, _NO_PART)
        if not parts:
            return None
        root = parts[0]
        start, end = self.facts.ticks(span)
        seconds = sum(self.facts.seconds(part.first_op, part.stop_op) for part in parts)
        overhead = 0.0
        for part in parts:
            overhead += self.cost.bookkeeping.region * (1 + (part.parent >= 0))
            num_handles = part.stop_handle - part.first_handle
            overhead += self.cost.bookkeeping.saved_tensor * num_handles
            if part.region.keeps_choices:  # both of its runs are watched
                num_ops = self.facts.ops(part.span)[1] + part.stop_op - 2 * part.first_op
                overhead += self.cost.bookkeeping.watched_op * num_ops
        return Option(
            call=span.calls[0],
            module=root.region.module,
            start=start,
            end=end,
            parts=tuple(parts),
            part_of=self._part_of(parts),
            seconds=seconds,
            overhead_seconds=overhead,
            holds=tuple(
                (s, start, root.release)
                for s in self.facts.inputs(span)
                if self.trace.storages[s].kind not in BASE_KINDS
            ),
            kept=tuple(self._snapshots(parts)),
            replays=tuple(self._replays(parts)),
            inner_inputs=tuple(self._inner_inputs(parts)),
        )

    def drops_anything(self, option: Option) -> bool:
        """Whether any bytes that are made inside are held by saved tensors alone."""
        root = option.parts[0]
        handles = self.trace.handles[root.first_handle : root.stop_handle]
        dropped = {h.storage for h in handles if option.owns(h.storage)}
        return any(self.trace.storages[s].size_bytes for s in dropped)

    # -- parts ------------------------------------------------------------------------------------

    def _add_parts(self, parts: list[Part], span: Span, parent: int) -> None:
        """Describe a span and those nested in it, the outer before the inner."""
        first_handle, stop_handle = self.facts.handles(span)
        handles = self.trace.handles[first_handle:stop_handle]
        unpacked = [h.unpack for h in handles if h.unpack >= 0]
        if not unpacked:
            return
        first_op, _ = self.facts.ops(span)
        inside = [self.facts.handles(child) for child in span.children]
        direct = (
            h.ops_before
            for number, h in enumerate(handles, first_handle)
            if not any(first <= number < stop for first, stop in inside)
        )
        # A nested region needs its inputs, and nothing of what it makes itself.
        starts = (self.facts.ops(child)[0] for child in span.children)
        first_storage, stop_storage = self.facts.storages(span)
        position = len(parts)
        parts.append(
            Part(
                span=span, parent=parent, first_op=first_op,
                stop_op=max((*direct, *starts), default=first_op),
                first_handle=first_handle, stop_handle=stop_handle,
                first_storage=first_storage, stop_storage=stop_storage,
                back_at=min(unpacked), release=max(h.end for h in handles),
                region=self._region(span, is_nested=parent >= 0),
            )
        )  # fmt: skip
        for child in span.children:
            self._add_parts(parts, child, position)

    def _region(self, span: Span, *, is_nested: bool) -> Region:
        first_op, stop_op = self.facts.ops(span)
        ops = self.trace.ops[first_op:stop_op]
        names = dict.fromkeys(
            name
            for op in ops
            for storage in op.mutated
            for name in self.trace.buffer_names.get(storage, ())[:1]
        )
        calls = [self.trace.calls[c] for c in span.calls]
        first = calls[0]
        passed = self._passed(span)
        return Region(
            module=first.module,
            call=first.index,
            num_calls=self.facts.calls_of[first.module],
            followers=tuple(call.module for call in calls[1:]),
            argument=passed[0],
            result=passed[1],
            is_nested=is_nested,
            draws_random_numbers=(
                any(op.is_random for op in ops) or any(call.moves_random_state for call in calls)
            ),
            draws_python_random=any(call.draws_python_random for call in calls),
            mutated_buffers=tuple(names),
            keeps_choices=any(self.trace.chooses(op) for op in ops),
        )

    def _passed(self, span: Span) -> tuple[int, int]:
        """Return which leaf of a run's arguments takes which leaf of the result before it."""
        if len(span.calls) == 1:
            return 0, 0
        one, two = (self.trace.calls[c] for c in span.calls[:2])
        result = one.results.tensors[0]
        return two.arguments.names.index(one.results.names[result]), result

    def named(self, first_op: int, stop_op: int, chosen: frozenset[int]) -> tuple[SavedOp, ...]:
        """Name ops by their occurrence within the call, which holds in any run of it."""
        counts: dict[str, int] = {}
        named = []
        for position in range(first_op, stop_op):
            name = self.trace.ops[position].name
            if position in chosen:
                named.append(SavedOp(name=name, occurrence=counts.get(name, 0)))
            counts[name] = counts.get(name, 0) + 1
        return tuple(named)

    def _part_of(self, parts: list[Part]) -> tuple[int, ...]:
        """Return the innermost part of each handle of the outermost; empty if there is one part."""
        if len(parts) == 1:
            return ()
        first = parts[0].first_handle
        found = [0] * (parts[0].stop_handle - first)
        for number, part in enumerate(parts[1:], 1):
            for handle in range(part.first_handle, part.stop_handle):
                found[handle - first] = number
        return tuple(found)

    # -- memory -----------------------------------------------------------------------------------

    def _inner_inputs(self, parts: list[Part]) -> Iterator[tuple[int, int, int, int]]:
        """Yield what nested regions hold from the recomputation around them to their own."""
        for part in parts[1:]:
            for storage in self.facts.inputs(part.span):
                around = part.parent
                while around >= 0:
                    outer = parts[around]
                    if outer.first_storage <= storage < outer.stop_storage:
                        yield storage, around, outer.back_at + 1, part.back_at
                        break
                    around = outer.parent

    def _snapshots(self, parts: list[Part]) -> Iterator[tuple[int, int, int]]:
        for part in parts:
            size = self._snapshot_bytes(part)
            if size:
                yield self.facts.ticks(part.span)[0], part.release, size
            for op in self._choices(part):
                yield op.tick, part.release, self.trace.storages[op.fresh[-1]].size_bytes

    def _choices(self, part: Part) -> Iterator[Op]:
        """Yield the ops of a part whose choices are kept; the last that they make are these."""
        if part.region.keeps_choices:
            for op in self.trace.ops[slice(*self.facts.ops(part.span))]:
                if self.trace.chooses(op) and op.fresh:
                    yield op

    def _snapshot_bytes(self, part: Part) -> int:
        """Return the bytes of the buffers and random state that a part must start from again."""
        written = {
            storage
            for op in self.trace.ops[slice(*self.facts.ops(part.span))]
            for storage in op.mutated
            if storage in self.trace.buffer_names
        }
        size = sum(self.trace.storages[storage].size_bytes for storage in written)
        return size + RNG_STATE_BYTES * part.region.draws_random_numbers

    def _replays(self, parts: list[Part]) -> Iterator[tuple[int, int]]:
        left: list[int] = []
        for part in parts:
            most, remains = self._replay_bytes(part, parts)
            # While it runs again, the present random state is kept aside, buffers are copies, and
            # the regions inside that begin keep what they start from and choose a second time.
            most += self._snapshot_bytes(part)
            inner = [p for p in parts if _begins_in(part, p, parts)]
            most += sum(size for _, _, size in self._snapshots(inner))
            # What the recomputations around it, at the same moment, have made is not alive before.
            around = part.parent
            same = left[around] if around >= 0 and parts[around].back_at == part.back_at else 0
            left.append(same + remains)
            yield part.back_at, same + most

    def _replay_bytes(self, part: Part, parts: list[Part]) -> tuple[int, int]:
        """Return the most bytes that running a part again holds, and what of them remains."""
        first_op, stop_op = part.first_op, part.stop_op
        if stop_op <= first_op:
            return 0, 0
        last = self.facts.op_ticks[stop_op - 1]
        packed = self._packed_in(part, parts)
        changes: dict[int, int] = {}
        remains = 0
        for number in range(part.first_storage, part.stop_storage):
            storage = self.trace.storages[number]
            if storage.birth > last:
                continue
            dead = max((d for b, d in storage.intervals if b <= last), default=storage.birth)
            if number in packed:
                remains += storage.size_bytes
                dead = last if packed[number] <= dead + 1 or packed[number] <= last else dead
            changes[storage.birth] = changes.get(storage.birth, 0) + storage.size_bytes
            changes[dead + 1] = changes.get(dead + 1, 0) - storage.size_bytes
        for position in range(first_op, stop_op):
            workspace = self.cost.op_workspace[position]
            if workspace:
                tick = self.facts.op_ticks[position]
                changes[tick] = changes.get(tick, 0) + workspace
                changes[tick + 1] = changes.get(tick + 1, 0) - workspace
        alive = most = 0
        for tick in sorted(changes):
            alive += changes[tick]
            most = max(most, alive)
        return most, remains

    def _packed_in(self, part: Part, parts: list[Part]) -> dict[int, int]:
        """Return the storages that a part's recomputation keeps, with the tick of the first use.

        They are what it saves itself, outside the regions nested in it, and the inputs of these.
        """
        children = [p for p in parts if p.parent >= 0 and parts[p.parent] is part]
        packed: dict[int, int] = {}
        handle = part.first_handle
        for child in children:
            for number in range(handle, child.first_handle):
                saved = self.trace.handles[number]
                packed.setdefault(saved.storage, saved.pack)
            for storage in self.facts.inputs(child.span):
                packed.setdefault(storage, self.facts.ticks(child.span)[0])
            handle = child.stop_handle
        for number in range(handle, part.stop_handle):
            saved = self.trace.handles[number]
            packed.setdefault(saved.storage, saved.pack)
        return packed


def _begins_in(part: Part, inner: Part, parts: list[Part]) -> bool:
    """Whether the recomputation of a part comes to the start of another that is nested in it."""
    if inner.parent >= 0 and parts[inner.parent] is part:
        return inner.first_op <= part.stop_op
    around = inner.parent
    while around >= 0 and parts[around] is not part:
        around = parts[around].parent
    return around >= 0 and inner.first_op < part.stop_op
