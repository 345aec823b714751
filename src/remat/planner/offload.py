"""Offload options: what waits in host memory between forward and backward.

NOTE [ What an offload changes ]
Two kinds; neither changes a value.
(a) A module call is not recomputed; each storage that its saved tensors alone hold waits on the
    host. It is alive on the device until the next of them is saved, or to the call's end; a copy of
    it is back from when backward first reads the one before it, or it itself if it is the first.
(b) A region is recomputed, and its inputs wait on the host. They are not held after its forward;
    copies are back from its recomputation on, each until the last saved tensor in it is released.
So at most one storage of a call is on its way at any time, in either direction, and when it is on
the device follows from the trace (see NOTE [ One on its way ] in `remat.regions.offload`).

Cost: a storage of b bytes takes T = b / bandwidth each way. Where copies overlap, the computation
waits for one at the moment that ends its stretch: T less the seconds of the ops from the moment
that began it, if that is positive; the first one back waits for all of T. Elsewhere, all of 2 T.

NOTE [ Fetched early ]
Where copies overlap, there are two more of each kind: the first storage back, or all of them, are
fetched when backward comes to the result of a module call further on, the last one from which on
the computation hides them. They are on the device from that tick on, which follows from the trace
as well, whatever is decided for that call (see NOTE [ Entered ] in `remat.regions.prefetch`).
Fetched together, they come one after another, and the computation waits for the latest of them.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from remat.planner.options import Option, OptionBuilder
from remat.planner.records import Offload, Prefetch, Region
from remat.planner.spans import Facts, Span
from remat.trace.records import BACKWARD, BASE_KINDS, FORWARD

# Smaller storages are left on the device: their bookkeeping costs more than they hold.
LEAST_BYTES = 4096
# A prefetch that hides less of what an offload costs is not worth another option.
_LEAST_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class _Leaving:
    """One storage that leaves: where among the saved tensors, and from when to when it is held."""

    storage: int
    size_bytes: int
    position: int
    sent_at: int
    read_at: int


@dataclass(frozen=True, slots=True)
class _Early:
    """Copies that come before they are read: from which tick on, at which call, what they cost."""

    call: int
    since: int
    num_tensors: int
    seconds: float


def find_offloads(facts: Facts, options: Iterable[Option]) -> tuple[Option, ...]:
    """List the module calls that may be offloaded, and the given regions with inputs on the host.

    Of calls that would offload the same storages, the shortest one is taken.
    """
    builder = _OffloadBuilder(facts)
    shortest: dict[frozenset[int], Option] = {}
    for number, call in enumerate(facts.trace.calls):
        if call.phase != FORWARD or not call.uses_grad or call.stop_op < 0:
            continue
        made = builder.saved_tensors(Span((number,)))
        if made is not None:
            twin = shortest.get(frozenset(made.away))
            if twin is None or made.end - made.start < twin.end - twin.start:
                shortest[frozenset(made.away)] = made
    found: list[Option] = []
    for late in shortest.values():
        found += (late, *builder.earlier(late, partial(builder.saved_tensors, late.parts[0].span)))
    for option in options:
        moved = builder.inputs(option)
        if moved is not None:
            found += (moved, *builder.earlier(moved, partial(builder.inputs, option)))
    return tuple(found)


class _OffloadBuilder:
    """Work out what offloading frees, holds and costs."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.trace, self.cost = facts, facts.trace, facts.cost
        self._regions = OptionBuilder(facts)
        self._seconds_until = [0.0]
        self._ticks = [op.tick for op in facts.trace.ops]
        for seconds in facts.cost.op_seconds:
            self._seconds_until.append(self._seconds_until[-1] + seconds)
        self._holders: dict[int, tuple[int, int]] = {}  # storage -> first, last handle
        for number, handle in enumerate(facts.trace.handles):
            first, _ = self._holders.get(handle.storage, (number, number))
            self._holders[handle.storage] = first, number
        starts = facts.trace.phase_start.get(BACKWARD, facts.trace.num_ticks)
        self._entries = sorted(
            (call.entered, number)
            for number, call in enumerate(facts.trace.calls)
            if call.phase == FORWARD and call.entered >= starts
        )

    def earlier(self, late: Option, make: Callable[[int], Option | None]) -> Iterator[Option]:
        """Yield what `make` says of fetching the first storage, or all, where that costs less."""
        offload = late.parts[0].region.offload
        if offload is None or not self.cost.copies_overlap:
            return
        least = late.overhead_seconds
        for count in dict.fromkeys((1, len(offload.tensors))):
            made = make(count)
            gain = _LEAST_GAIN * offload.transfer_seconds
            if made is not None and made.overhead_seconds < least - gain:
                least = made.overhead_seconds
                yield made

    # -- (a) what a call saved --------------------------------------------------------------------

    def saved_tensors(self, span: Span, num_early: int = 0) -> Option | None:
        """Describe a call whose saved tensors wait on the host; `None` if none can.

        The first `num_early` of them are fetched before they are read.
        """
        first, stop = self.facts.handles(span)
        leaving = sorted(self._alone(first, stop), key=lambda s: s.sent_at)
        option = self._regions.option(span) if leaving else None
        if option is None or self.facts.loses_noise(span):
            return None
        gone = [*(s.sent_at for s in leaving[1:]), option.end]
        returning = sorted(leaving, key=lambda s: s.read_at)
        asked = [returning[0].read_at, *(s.read_at for s in returning[:-1])]
        early = self._early(option.end, returning[:num_early])
        if num_early:
            if early is None:
                return None
            asked[:num_early] = [early.since] * num_early
        sent = [(s, s.sent_at, until) for s, until in zip(leaving, gone, strict=True)]
        read = [(s, since, s.read_at) for s, since in zip(returning, asked, strict=True)]
        offload = self._offload(returning, [*sent, *read[num_early:]], early)
        root = option.parts[0]
        region = Region(
            module=root.region.module, call=root.region.call, num_calls=root.region.num_calls,
            is_recomputed=False, offload=offload,
        )  # fmt: skip
        return dataclasses.replace(
            option,
            parts=(dataclasses.replace(root, region=region, stop_op=root.first_op),),
            seconds=0.0,
            overhead_seconds=offload.transfer_seconds
            + self.cost.bookkeeping.saved_tensor * (stop - first),
            holds=tuple((s.storage, s.sent_at, until) for s, _, until in sent),
            kept=(),
            replays=(),
            is_recomputed=False,
            away={s.storage: since for s, since, _ in read},
            host_bytes=offload.host_bytes,
        )

    def _alone(self, first: int, stop: int) -> Iterator[_Leaving]:
        """Yield the storages that only a stretch of saved tensors holds until backward."""
        handles = self.trace.handles
        position = -1
        reads: dict[int, int] = {}
        for handle in handles[first:stop]:
            if handle.unpack >= 0:
                reads[handle.storage] = min(handle.unpack, reads.get(handle.storage, handle.unpack))
        for number in range(first, stop):
            storage = handles[number].storage
            if not self.trace.storages[storage].size_bytes:
                continue
            position += 1
            one, last = self._holders[storage]
            read_at = reads.get(storage)
            if one != number or last >= stop or read_at is None:
                continue
            sent_at = handles[number].pack
            if self._may_leave(storage, sent_at, read_at):
                size = self.trace.storages[storage].size_bytes
                yield _Leaving(storage, size, position, sent_at, read_at)

    def _may_leave(self, storage: int, sent_at: int, read_at: int) -> bool:
        record = self.trace.storages[storage]
        return (
            record.kind not in BASE_KINDS
            and record.size_bytes >= LEAST_BYTES
            and not any(first <= read_at <= last for first, last in record.intervals)
            and not any(tick > sent_at for tick in self.facts.writes.get(storage, ()))
        )

    # -- (b) what a region is given ---------------------------------------------------------------

    def inputs(self, option: Option, num_early: int = 0) -> Option | None:
        """Describe a region whose inputs wait on the host; `None` if none can.

        The first `num_early` of them are fetched before the region runs again.
        """
        if len(option.parts) > 1 or not option.is_recomputed:
            return None
        root = option.parts[0]
        given = self.trace.calls[option.call].arguments.storages
        leaving: dict[int, _Leaving] = {}
        for position, storage in enumerate(
            s for s in given if self.trace.storages[s].size_bytes
        ):  # fmt: skip
            if storage not in leaving and self._may_leave(storage, option.start, root.back_at):
                size = self.trace.storages[storage].size_bytes
                leaving[storage] = _Leaving(storage, size, position, option.start, root.back_at)
        # What is also inside a container that is no tuple, list or dict stays with its holder.
        if not leaving:
            return None
        order = list(leaving.values())
        gone = [*(s.sent_at for s in order[1:]), option.end]
        sent = [(s, s.sent_at, until) for s, until in zip(order, gone, strict=True)]
        early = self._early(option.end, order[:num_early])
        if num_early and early is None:
            return None
        late = order[num_early:]
        offload = self._offload(order, [*sent, *((s, s.read_at, s.read_at) for s in late)], early)
        region = root.region.model_copy(update={"offload": offload})
        return dataclasses.replace(
            option,
            parts=(dataclasses.replace(root, region=region),),
            overhead_seconds=option.overhead_seconds + offload.transfer_seconds,
            holds=tuple(
                (s, first, option.end if s in leaving else last) for s, first, last in option.holds
            ),
            # Copies of the inputs are alive all through the recomputation, beside what it makes.
            replays=tuple(
                (tick, size + sum(s.size_bytes for s in late)) for tick, size in option.replays
            ),
            inner_inputs=tuple(
                (s.storage, 0, early.since, root.back_at) for s in order[:num_early] if early
            ),
            away=dict.fromkeys(leaving, root.back_at + 1),
            host_bytes=offload.host_bytes,
        )

    # -- cost -------------------------------------------------------------------------------------

    def _early(self, after: int, fetched: Sequence[_Leaving]) -> _Early | None:
        """Find where to fetch storages of a call that ended at tick `after`, before they are read.

        It is where backward comes to the result of a call that ends later: the last from which on
        the computation hides the copies, else the first of all; `None` if there is none.
        """
        if not fetched:
            return None
        first = fetched[0].read_at
        hidden = self._waited(fetched, first)
        stop = bisect_left(self._ticks, first)
        op = bisect_right(self._seconds_until, self._seconds_until[stop] - hidden) - 1
        latest = self._ticks[op] if 0 <= op < stop else -1
        before = self._entries[: bisect_left(self._entries, (first, -1))]
        place = bisect_right(before, (latest, len(self.trace.calls)))
        for since, number in (*reversed(before[:place]), *before[place:]):
            if self.trace.calls[number].end > after:
                return _Early(number, since, len(fetched), self._waited(fetched, since - 1))
        return None

    def _waited(self, fetched: Iterable[_Leaving], begins: int) -> float:
        """Return how long the computation waits for copies that are asked for at one tick."""
        done = most = 0.0
        for moved in fetched:
            done += moved.size_bytes / self.cost.host_bytes_per_s
            most = max(most, done - self._computing(begins, moved.read_at))
        return most

    def _offload(
        self,
        order: Sequence[_Leaving],
        copies: Iterable[tuple[_Leaving, int, int]],
        early: _Early | None,
    ) -> Offload:
        """Write the decision; `copies` are what moves, with the ticks that begin and end it.

        What is fetched early is not among them.
        """
        seconds = 0.0 if early is None else early.seconds
        for moved, begins, ends in copies:
            needed = moved.size_bytes / self.cost.host_bytes_per_s
            hidden = self._computing(begins, ends) if self.cost.copies_overlap else 0.0
            seconds += max(0.0, needed - hidden)
        return Offload(
            tensors=tuple(s.position for s in order),
            host_bytes=sum(s.size_bytes for s in order),
            transfer_seconds=seconds,
            prefetch=None if early is None else self._prefetch(early),
        )

    def _prefetch(self, early: _Early) -> Prefetch:
        call = self.trace.calls[early.call]
        return Prefetch(
            module=call.module,
            call=call.index,
            num_calls=self.facts.calls_of[call.module],
            num_tensors=early.num_tensors,
        )

    def _computing(self, begins: int, ends: int) -> float:
        """Return the seconds of the ops between two ticks."""
        first, stop = bisect_right(self._ticks, begins), bisect_left(self._ticks, ends)
        return self._seconds_until[max(first, stop)] - self._seconds_until[first]
