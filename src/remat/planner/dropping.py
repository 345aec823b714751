"""Dropping: single results of ops that are made again in backward, without the rest of a module.

NOTE [ What dropping changes ]
Inside a module call every op is watched, and a plan names recipes (see NOTE [ Recipes ]) whose
results are dropped.
1. Where autograd saves such a result, or a view of it, nothing is held.
2. When backward first reads one, its recipe runs again, after those dropped ones that it needs and
   that have not run again yet, in the order of the forward. A recipe runs again at most once.
3. What a recipe reads and is not dropped is held until it has run again; parameters are anyway.
   So are the copies of buffers and random states that it begins with.
4. A result is then alive until autograd lets go of it and every dropped recipe that reads it has
   run.
5. A result may be kept packed instead (see NOTE [ Packing ]): it comes back when it is first read,
   by backward or by a recipe, and runs nothing again.
Nothing else runs again: no Python code, no hooks, no views. See `remat.regions.dropping` for how
that is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from remat.planner.blocks import find_blocks
from remat.planner.cuts import Stretch, find_cuts
from remat.planner.options import RNG_STATE_BYTES, Option, OptionBuilder
from remat.planner.packing import Packing, find_packings, key_of
from remat.planner.recipes import Recipe, find_recipes
from remat.planner.spans import Facts, Span
from remat.trace.records import BASE_KINDS, FORWARD

# Smaller results stay: their bookkeeping costs more than they hold.
_LEAST_BYTES = 4096
_MOST_CUTS = 8
# A call that holds several blocks excludes what else they could do: it needs finer steps.
_MOST_CUTS_OF_MANY = 24


def find_drops(facts: Facts) -> tuple[Option, ...]:
    """List, for each module call, sets of results to drop: those of the cheapest cuts.

    Of calls in which the same results would be dropped the one that watches fewer ops is taken.
    """
    builder = _DropBuilder(facts)
    found: dict[frozenset[int], Option] = {}  # by what is dropped: keys of recipes and packings
    for number, call in enumerate(facts.trace.calls):
        if call.phase != FORWARD or not call.uses_grad or call.stop_op < 0:
            continue
        for chosen, option in builder.options(Span((number,))):
            twin = found.get(chosen)
            if twin is None or option.overhead_seconds < twin.overhead_seconds:
                found[chosen] = option
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class _Replay:
    """When results come back, which together in which order, and which recipes read a storage.

    Recipes and packings go by their keys; `makers` says which of them brings a storage back.
    """

    ran_at: dict[int, int]
    order: tuple[tuple[int, list[int]], ...]
    readers: dict[int, set[int]]
    makers: Mapping[int, int]

    def last_read(self, storage: int) -> int:
        """Return the tick at which the last recipe that reads a storage runs again."""
        return max(self.ran_at[r] for r in self.readers[storage])


class _DropBuilder:
    """Work out what dropping single results frees, holds and costs."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.trace = facts, facts.trace
        self._regions = OptionBuilder(facts)
        self._blocks = [facts.trace.calls[block].start for block in find_blocks(facts.trace)]
        self._recipes = find_recipes(facts)
        self._packings = find_packings(facts, self._recipes.values())
        ways: list[Recipe | Packing] = [*self._recipes.values(), *self._packings.values()]
        self._ways = {way.key: way for way in ways}
        self._makers = {s: last for last, r in self._recipes.items() for s in r.results}
        self._handles: dict[int, list[int]] = {}
        for number, handle in enumerate(facts.trace.handles):
            self._handles.setdefault(handle.storage, []).append(number)
        self._backward = facts.trace.phase_start.get("backward", facts.trace.num_ticks)

    def options(self, span: Span) -> Iterator[tuple[frozenset[int], Option]]:
        """Yield the choices of results to drop inside a span, by key."""
        stretch = self._stretch(span)
        if stretch is None or self.facts.refusal(span) is not None:
            return
        whole = self._regions.option(span)
        if whole is None:
            return
        most = _MOST_CUTS_OF_MANY if self._spans_blocks(span) else _MOST_CUTS
        for cut in find_cuts(stretch, most):
            chosen = cut.ops | {key_of(s) for s in cut.packed}
            option = self._option(span, whole, chosen)
            if option is not None:
                yield chosen, option

    def _option(self, span: Span, whole: Option, chosen: frozenset[int]) -> Option | None:
        """Describe a span in which what some recipes and packings bring back is dropped."""
        replay = self._replay(chosen, range(*self.facts.handles(span)))
        if not replay.ran_at:
            return None
        root = whole.parts[0]
        first_op, stop_op = self.facts.ops(span)
        ways = [self._ways[key] for key in sorted(replay.ran_at)]
        packings = [way for way in ways if isinstance(way, Packing)]
        dropped = frozenset(p for way in ways if isinstance(way, Recipe) for p in way.ops)
        packed = frozenset(p for packing in packings for p in packing.ops)
        region = root.region.model_copy(
            update={
                "dropped_ops": self._regions.named(first_op, stop_op, dropped),
                "packed_ops": self._regions.named(first_op, stop_op, packed - dropped),
                "packed_bytes": sum(packing.kept_bytes for packing in packings),
                "packing_seconds": sum(packing.packing_seconds for packing in packings),
                "spans_blocks": self._spans_blocks(span),
            }
        )
        added = self.facts.cost.bookkeeping
        watching = added.watched_tensor * (root.stop_handle - root.first_handle)
        watching += added.watched_op * (stop_op - first_op)
        return Option(
            call=whole.call, module=whole.module, start=whole.start, end=whole.end,
            parts=(dataclasses.replace(root, region=region),), part_of=(),
            seconds=sum(way.seconds for way in ways),
            overhead_seconds=watching + sum(way.overhead_seconds for way in ways),
            holds=tuple(self._holds(replay)),
            kept=tuple(
                (way.kept_from, replay.ran_at[way.key], way.kept_bytes)
                for way in ways
                if way.kept_bytes
            ),
            replays=(
                *((p.kept_from, p.packing_bytes) for p in packings if p.packing_bytes),
                *self._replays(replay),
            ),
            inner_inputs=tuple(self._passed_on(replay)),
            is_recomputed=False,
            away={
                s: replay.ran_at[way.key] + 1
                for way in ways
                for s in way.results
                if s in self._handles
            },
        )  # fmt: skip

    def _spans_blocks(self, span: Span) -> bool:
        """Whether a span is the whole model, or holds several of its blocks."""
        first, last = self.facts.ticks(span)
        is_model = not self.trace.calls[span.calls[0]].module
        return is_model or sum(first <= start <= last for start in self._blocks) > 1

    # -- what may be dropped ----------------------------------------------------------------------

    def _stretch(self, span: Span) -> Stretch | None:
        """Write a span's recipes and the memory between them; `None` if none can be dropped."""
        inside = range(*self.facts.handles(span))
        first_op, stop_op = self.facts.ops(span)
        makers: dict[int, int] = {}
        saved: set[int] = set()
        for position in range(first_op, stop_op):
            recipe = self._recipes.get(position)
            if recipe is None or recipe.first < first_op:
                continue
            for s in recipe.results:
                numbers = self._handles.get(s, ())
                if self._is_there(s) or any(n not in inside for n in numbers):
                    continue
                makers[s] = position
                if any(self.trace.handles[n].unpack >= 0 for n in numbers):
                    saved.add(s)
        if not saved:
            return None
        seconds: dict[int, float] = {}
        sources: dict[int, tuple[int, ...]] = {}
        sizes = {s: self.trace.storages[s].size_bytes for s in sorted(saved)}
        waiting = [makers[s] for s in sorted(saved)]
        while waiting:
            last = waiting.pop()
            if last in seconds:
                continue
            recipe = self._recipes[last]
            seconds[last] = recipe.seconds + recipe.overhead_seconds
            needed = [s for s in recipe.sources if s in makers or not self._is_held(s)]
            sources[last] = tuple(needed)
            for s in needed:
                sizes[s] = self.trace.storages[s].size_bytes
                if s in makers:
                    waiting.append(makers[s])
        return Stretch(
            seconds=seconds, sources=sources, sizes=sizes, saved=frozenset(saved),
            makers={s: last for s, last in makers.items() if last in seconds},
            packed={
                s: (packing.kept_bytes, packing.overhead_seconds)
                for s in sizes
                if s in makers and (packing := self._packings.get(s)) is not None
            },
        )  # fmt: skip

    def _is_there(self, storage: int) -> bool:
        """Whether a storage is alive in backward whatever is saved, or weighs nothing."""
        record = self.trace.storages[storage]
        return (
            record.kind in BASE_KINDS
            or record.size_bytes < _LEAST_BYTES
            or any(last >= self._backward for _, last in record.intervals)
        )

    def _is_held(self, storage: int) -> bool:
        """Whether a storage that is not made inside is held until backward anyway."""
        return self._is_there(storage) or storage in self._handles

    # -- when it comes back -----------------------------------------------------------------------

    def _replay(self, chosen: frozenset[int], handles: range) -> _Replay:
        """Follow backward through the saved tensors; see NOTE [ What dropping changes ]."""
        makers = {s: key for key in chosen for s in self._ways[key].results}
        reads: dict[int, int] = {}
        for number in handles:
            handle = self.trace.handles[number]
            key = makers.get(handle.storage)
            if key is not None and handle.unpack >= 0:
                reads[key] = min(handle.unpack, reads.get(key, handle.unpack))
        ran_at: dict[int, int] = {}
        order = []
        for key, tick in sorted(reads.items(), key=lambda item: item[1]):
            needed = self._needed(key, makers, ran_at)
            if needed:
                order.append((tick, sorted(needed)))
                ran_at.update(dict.fromkeys(needed, tick))
        readers: dict[int, set[int]] = {}
        for key in sorted(ran_at):
            for s in self._ways[key].sources:
                readers.setdefault(s, set()).add(key)
        return _Replay(ran_at, tuple(order), readers, makers)

    def _needed(self, key: int, makers: Mapping[int, int], ran: dict[int, int]) -> set[int]:
        """Return a recipe and what else must come back before it, unless it has."""
        needed: set[int] = set()
        waiting = [key]
        while waiting:
            found = waiting.pop()
            if found not in needed and found not in ran:
                needed.add(found)
                waiting += [makers[s] for s in self._ways[found].sources if s in makers]
        return needed

    def _holds(self, replay: _Replay) -> Iterator[tuple[int, int, int]]:
        for s, readers in replay.readers.items():
            is_dropped = replay.makers.get(s) in replay.ran_at
            if not is_dropped and self.trace.storages[s].kind not in BASE_KINDS:
                first = min(self.facts.op_ticks[self._recipes[r].first] for r in readers)
                yield s, max(first, self.trace.storages[s].birth), replay.last_read(s)

    def _passed_on(self, replay: _Replay) -> Iterator[tuple[int, int, int, int]]:
        for s in replay.readers:
            made_at = replay.ran_at.get(replay.makers[s]) if s in replay.makers else None
            if made_at is not None and replay.last_read(s) > made_at:
                yield s, 0, made_at + 1, replay.last_read(s)

    def _replays(self, replay: _Replay) -> Iterator[tuple[int, int]]:
        """Yield the most bytes that each recomputation holds beside what is alive then."""
        left = {s: len(readers) for s, readers in replay.readers.items()}
        for tick, recipes in replay.order:
            alive = most = 0
            for key in recipes:
                recipe = self._ways[key]
                alive += recipe.size_bytes
                # The present random state is kept aside meanwhile.
                aside = RNG_STATE_BYTES if recipe.draws else 0
                most = max(most, alive + recipe.workspace_bytes + aside)
                for s in recipe.sources:
                    left[s] -= 1
                gone = {s for s in recipe.sources if not left[s]}
                gone |= {s for s in recipe.results if not left.get(s)}
                alive -= recipe.kept_bytes
                for s in gone:
                    if not self._outlives(s, tick):
                        alive -= self.trace.storages[s].size_bytes
            yield tick, most

    def _outlives(self, storage: int, tick: int) -> bool:
        """Whether something holds a storage after a recomputation was the last to need it."""
        record = self.trace.storages[storage]
        return (
            record.kind in BASE_KINDS
            or any(self.trace.handles[n].end >= tick for n in self._handles.get(storage, ()))
            or any(first <= tick <= last for first, last in record.intervals)
        )
