"""Options: the module calls of a trace that may be recomputed, and what each would take."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from remat.cost.model import SELECTIVE_OP_OVERHEAD_S, StepCost
from remat.planner.records import Hazard, Region, SavedOp
from remat.trace.records import BASE_KINDS, FORWARD, Call, Op, StepTrace

# Bytes of generator state that checkpointing keeps for each region that draws (CPU: Mersenne
# twister, `torch.get_rng_state().numel()`); fake tensors do not show them.
RNG_STATE_BYTES = 5056

# Ops whose price per saved byte is within this factor are saved together or not at all.
_SAME_PRICE = 1.25
_MOST_VARIANTS = 5

# A recomputation of these would not give the same values.
_NOT_REPLAYABLE = {
    "aten.rrelu_with_noise": "RReLU's noise is filled in place and lost under saved-tensor hooks "
    "(pytorch#193671)",
    "aten.rrelu_with_noise_": "RReLU's noise is filled in place and lost under saved-tensor hooks "
    "(pytorch#193671)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One module call as a region.

    `first_op`..`stop_op` are recomputed when backward first reads one of its saved tensors, at
    tick `recompute_at`; recomputation stops at the last tensor packed. `holds` are the storages
    that the region keeps alive, with first and last tick: its inputs until the last of its saved
    tensors is released, and the results of `saved_ops` until recomputation takes them.
    `replay_bytes` is the most that recomputation itself holds.
    """

    call: int
    module: str
    index: int
    num_calls: int
    parents: tuple[int, ...]
    start: int
    end: int
    recompute_at: int
    release: int
    first_op: int
    stop_op: int
    seconds: float
    overhead_seconds: float
    holds: tuple[tuple[int, int, int], ...]
    replay_bytes: int
    held_bytes: int
    first_handle: int
    stop_handle: int
    first_storage: int
    stop_storage: int
    cached: frozenset[int]
    saved_ops: tuple[SavedOp, ...]
    draws_random_numbers: bool
    draws_python_random: bool
    mutated_buffers: tuple[str, ...]

    def owns(self, storage: int) -> bool:
        """Whether recomputation makes a storage anew, so that handles come back as copies."""
        return self.first_storage <= storage < self.stop_storage and storage not in self.cached

    def excludes(self, other: Option) -> bool:
        """Whether at most one of two options can be chosen: same call, or one in the other."""
        return self.call == other.call or self.call in other.parents or other.call in self.parents

    def region(self) -> Region:
        """Return the decision to recompute this call, as data."""
        return Region(
            module=self.module,
            call=self.index,
            num_calls=self.num_calls,
            draws_random_numbers=self.draws_random_numbers,
            draws_python_random=self.draws_python_random,
            mutated_buffers=self.mutated_buffers,
            saved_ops=self.saved_ops,
            recompute_seconds=self.seconds + self.overhead_seconds,
        )


@dataclass(frozen=True, slots=True)
class OptionSet:
    """Every option of a trace, in order of their calls, and why other calls are none."""

    options: tuple[Option, ...]
    hazards: tuple[Hazard, ...]


def find_options(
    trace: StepTrace, cost: StepCost, *, keep: frozenset[int] = frozenset()
) -> OptionSet:
    """List the module calls that may be recomputed.

    Calls whose recomputation frees nothing (a linear layer saves its input, which must be held
    anyway) and all but one of calls that save the same tensors are left out, except those in
    `keep`.
    """
    finder = _Finder(trace, cost)
    options: list[Option] = []
    hazards: list[Hazard] = []
    seen: dict[tuple[int, int], int] = {}
    for number, call in enumerate(trace.calls):
        if call.phase != FORWARD or not call.module or not call.uses_grad or call.stop_op < 0:
            continue
        span = finder.handle_span(call)
        if span[0] == span[1]:
            continue
        reason = finder.refusal(call)
        if reason is not None:
            hazards.append(Hazard(code="not-replayable", where=call.module, message=reason))
            continue
        option = finder.option(number, call, span)
        if option is None:
            continue
        if number not in keep:
            if finder.droppable_bytes(option, span) == 0:
                continue
            twin = seen.get(span)
            if twin is not None:
                if option.seconds < options[twin].seconds:
                    options[twin] = option
                continue
            seen[span] = len(options)
        options.append(option)
    for option in list(options):
        options.extend(finder.selective(option))
    return OptionSet(tuple(options), tuple(hazards))


class _Finder:
    def __init__(self, trace: StepTrace, cost: StepCost) -> None:
        self.trace = trace
        self.cost = cost
        self.packs = [h.pack for h in trace.handles]
        self.is_saved = {h.storage for h in trace.handles}
        self.births = [s.birth for s in trace.storages]
        self.op_ticks = [op.tick for op in trace.ops]
        self.writes: dict[int, list[int]] = {}
        for op in trace.ops:
            for storage in op.mutated:
                self.writes.setdefault(storage, []).append(op.tick)
        self.cost_until = [0.0]
        for seconds in cost.op_seconds:
            self.cost_until.append(self.cost_until[-1] + seconds)
        self.calls_of: dict[str, int] = {}
        for call in trace.calls:
            if call.phase == FORWARD:
                self.calls_of[call.module] = self.calls_of.get(call.module, 0) + 1

    def handle_span(self, call: Call) -> tuple[int, int]:
        """Return which handles were packed inside a call: a run, since calls nest."""
        return bisect_left(self.packs, call.start), bisect_right(self.packs, call.end)

    def storage_span(self, call: Call) -> tuple[int, int]:
        return bisect_right(self.births, call.start), bisect_right(self.births, call.end)

    def ops(self, call: Call) -> list[Op]:
        return self.trace.ops[call.first_op : call.stop_op]

    def refusal(self, call: Call) -> str | None:
        """Say why a call cannot be recomputed, if it cannot."""
        first, stop = self.storage_span(call)
        inputs = set(call.inputs)
        outside: set[int] = set()
        for op in self.ops(call):
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
            outside.update(s for s in op.inputs if not first <= s < stop)
        if call.changed_state:
            hint = " Set config.use_cache=False." if "past_key_values" in call.changed_state else ""
            return f"it changes {call.changed_state}, which would change twice; it is kept.{hint}"
        release = self.trace.phase_start.get("optimizer", self.trace.num_ticks)
        own = {s for op in self.ops(call) for s in op.mutated if s in self.trace.buffer_names}
        for storage in (inputs | outside) - own:  # what it updates itself is restored for it
            if any(call.end < tick < release for tick in self.writes.get(storage, ())):
                return "what it reads is written to later, before backward; it is kept."
        return None

    def selective(self, option: Option) -> Iterator[Option]:
        """Yield variants of a region that save the results of its dearest ops.

        Ops are ranked by the seconds that saving one byte of their result saves; each variant
        saves all ops from the dearest down to some price. Ops that draw, write in place, or whose
        result is written to later are never saved.
        """
        call = self.trace.calls[option.call]
        ranked = sorted(self._savable(option), key=lambda item: -item[0])
        groups: list[tuple[float, list[int]]] = []
        for price, position in ranked:
            if groups and price > groups[-1][0] / _SAME_PRICE:
                groups[-1][1].append(position)
            else:
                groups.append((price, [position]))
        chosen: list[int] = []
        for _, positions in groups[:_MOST_VARIANTS]:
            chosen += positions
            made = self.option(
                option.call, call, (option.first_handle, option.stop_handle), frozenset(chosen)
            )
            if made is not None and made.seconds > 0 and self._drops_anything(made):
                yield made

    def _savable(self, option: Option) -> Iterator[tuple[float, int]]:
        for position in range(option.first_op, option.stop_op):
            op = self.trace.ops[position]
            size = sum(self.trace.storages[s].size_bytes for s in op.fresh)
            if not size or op.is_random or op.mutated or not op.flops:
                continue
            if any(self.writes.get(s) for s in op.fresh):
                continue
            yield self.cost.op_seconds[position] / size, position

    def _drops_anything(self, option: Option) -> bool:
        handles = self.trace.handles[option.first_handle : option.stop_handle]
        dropped = {h.storage for h in handles if option.owns(h.storage)}
        return any(self.trace.storages[s].size_bytes for s in dropped)

    def option(
        self,
        number: int,
        call: Call,
        span: tuple[int, int],
        saved: frozenset[int] = frozenset(),
    ) -> Option | None:
        """Describe a call as a region; `None` if backward reads nothing that it saved.

        `saved` are the positions of ops whose results are kept.
        """
        handles = self.trace.handles[span[0] : span[1]]
        unpacked = [h.unpack for h in handles if h.unpack >= 0]
        if not unpacked:
            return None
        stop_op = max(h.ops_before for h in handles)
        ops = self.ops(call)
        first, stop = self.storage_span(call)
        names = dict.fromkeys(
            name
            for op in ops
            for storage in op.mutated
            for name in self.trace.buffer_names.get(storage, ())[:1]
        )
        snapshot = sum(
            self.trace.storages[s].size_bytes
            for s in {s for op in ops for s in op.mutated if s in self.trace.buffer_names}
        )
        draws = any(op.is_random for op in ops)
        recompute_at, release = min(unpacked), max(h.end for h in handles)
        cached = frozenset(s for position in saved for s in self.trace.ops[position].fresh)
        seconds = self.cost_until[stop_op] - self.cost_until[call.first_op]
        overhead = self.cost.region_overhead_s + self.cost.saved_tensor_overhead_s * len(handles)
        if saved:
            seconds -= sum(self.cost.op_seconds[position] for position in saved)
            overhead += SELECTIVE_OP_OVERHEAD_S * (stop_op - call.first_op)
        parents = []
        parent = call.parent
        while parent >= 0:
            parents.append(parent)
            parent = self.trace.calls[parent].parent
        return Option(
            call=number,
            module=call.module,
            index=call.index,
            num_calls=self.calls_of[call.module],
            parents=tuple(parents),
            start=call.start,
            end=call.end,
            recompute_at=recompute_at,
            release=release,
            first_op=call.first_op,
            stop_op=stop_op,
            seconds=seconds,
            overhead_seconds=overhead,
            holds=(
                *(
                    (s, call.start, release)
                    for s in call.inputs
                    if self.trace.storages[s].kind not in BASE_KINDS
                ),
                *((s, self.trace.storages[s].birth, recompute_at) for s in sorted(cached)),
            ),
            # While it runs again, the present random state is kept aside.
            replay_bytes=self._replay_bytes(call, stop_op, span, (first, stop), saved)
            + (RNG_STATE_BYTES if draws else 0),
            held_bytes=snapshot + (RNG_STATE_BYTES if draws else 0),
            first_handle=span[0],
            stop_handle=span[1],
            first_storage=first,
            stop_storage=stop,
            cached=cached,
            saved_ops=self._saved_ops(call, saved),
            draws_random_numbers=draws,
            draws_python_random=call.draws_python_random,
            mutated_buffers=tuple(names),
        )

    def _saved_ops(self, call: Call, saved: Iterable[int]) -> tuple[SavedOp, ...]:
        """Name ops by their occurrence within the call, which holds in any run of it."""
        wanted = set(saved)
        counts: dict[str, int] = {}
        named = []
        for position in range(call.first_op, call.stop_op):
            name = self.trace.ops[position].name
            if position in wanted:
                named.append(SavedOp(name=name, occurrence=counts.get(name, 0)))
            counts[name] = counts.get(name, 0) + 1
        return tuple(named)

    def _replay_bytes(
        self,
        call: Call,
        stop_op: int,
        span: tuple[int, int],
        storages: tuple[int, int],
        saved: frozenset[int],
    ) -> int:
        """Return the most bytes that running the region again holds beside what is alive then."""
        if stop_op <= call.first_op:
            return 0
        last = self.op_ticks[stop_op - 1]
        changes: dict[int, int] = {}
        packed: dict[int, int] = {}
        for handle in self.trace.handles[span[0] : span[1]]:
            packed.setdefault(handle.storage, handle.pack)
        cached = {s for position in saved for s in self.trace.ops[position].fresh}
        for number in range(*storages):
            storage = self.trace.storages[number]
            if storage.birth > last:
                continue
            dead = max((d for b, d in storage.intervals if b <= last), default=storage.birth)
            if number in cached:
                # Alive before; gone once it was taken, unless something else holds it.
                if number not in self.is_saved and dead < last:
                    changes[dead + 1] = changes.get(dead + 1, 0) - storage.size_bytes
                continue
            if number in packed:
                dead = last if packed[number] <= dead + 1 or packed[number] <= last else dead
            changes[storage.birth] = changes.get(storage.birth, 0) + storage.size_bytes
            changes[dead + 1] = changes.get(dead + 1, 0) - storage.size_bytes
        for position in range(call.first_op, stop_op):
            workspace = 0 if position in saved else self.cost.op_workspace[position]
            if workspace:
                tick = self.op_ticks[position]
                changes[tick] = changes.get(tick, 0) + workspace
                changes[tick + 1] = changes.get(tick + 1, 0) - workspace
        alive = most = 0
        for tick in sorted(changes):
            alive += changes[tick]
            most = max(most, alive)
        return most

    def droppable_bytes(self, option: Option, span: tuple[int, int]) -> int:
        """Return the bytes made inside that only saved tensors hold at some time in between."""
        owned = {h.storage for h in self.trace.handles[span[0] : span[1]] if option.owns(h.storage)}
        return sum(self.trace.storages[s].size_bytes for s in owned)


def _has_generator(trace: StepTrace, op: Op) -> bool:
    signature = trace.signatures[op.signature]
    values = (*signature.arguments, *(value for _, value in signature.keywords))
    return any(isinstance(v, str) and v == "<Generator>" for v in values)
