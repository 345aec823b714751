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
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from remat.planner.options import Option, OptionBuilder
from remat.planner.records import Offload, Region
from remat.planner.spans import Facts, Span
from remat.trace.records import BASE_KINDS, FORWARD

# Smaller storages are left on the device: their bookkeeping costs more than they hold.
LEAST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Leaving:
    """One storage that leaves: where among the saved tensors, and from when to when it is held."""

    storage: int
    size_bytes: int
    position: int
    sent_at: int
    read_at: int


def find_offloads(facts: Facts, options: Iterable[Option]) -> tuple[Option, ...]:
    """List the module calls that may be offloaded, and the given regions with inputs on the host.

    Of calls that would offload the same storages, the shortest one is taken.
    """
    builder = _OffloadBuilder(facts)
    found: dict[frozenset[int], Option] = {}
    for number, call in enumerate(facts.trace.calls):
        if call.phase != FORWARD or not call.uses_grad or call.stop_op < 0:
            continue
        made = builder.saved_tensors(Span((number,)))
        if made is not None:
            twin = found.get(frozenset(made.away))
            if twin is None or made.end - made.start < twin.end - twin.start:
                found[frozenset(made.away)] = made
    recomputed = (builder.inputs(option) for option in options)
    return (*found.values(), *(option for option in recomputed if option is not None))


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

    # -- (a) what a call saved --------------------------------------------------------------------

    def saved_tensors(self, span: Span) -> Option | None:
        """Describe a call whose saved tensors wait on the host; `None` if none can."""
        first, stop = self.facts.handles(span)
        leaving = sorted(self._alone(first, stop), key=lambda s: s.sent_at)
        option = self._regions.option(span) if leaving else None
        if option is None:
            return None
        gone = [*(s.sent_at for s in leaving[1:]), option.end]
        returning = sorted(leaving, key=lambda s: s.read_at)
        asked = [returning[0].read_at, *(s.read_at for s in returning[:-1])]
        sent = [(s, s.sent_at, until) for s, until in zip(leaving, gone, strict=True)]
        read = [(s, since, s.read_at) for s, since in zip(returning, asked, strict=True)]
        offload = self._offload(returning, [*sent, *read])
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
            + self.cost.saved_tensor_overhead_s * (stop - first),
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

    def inputs(self, option: Option) -> Option | None:
        """Describe a region whose inputs wait on the host; `None` if none can."""
        if len(option.parts) > 1 or option.saved_ops:
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
        offload = self._offload(order, [*sent, *((s, s.read_at, s.read_at) for s in order)])
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
                (tick, size + sum(s.size_bytes for s in order)) for tick, size in option.replays
            ),
            away=dict.fromkeys(leaving, root.back_at + 1),
            host_bytes=offload.host_bytes,
        )

    # -- cost -------------------------------------------------------------------------------------

    def _offload(
        self, order: Sequence[_Leaving], copies: Iterable[tuple[_Leaving, int, int]]
    ) -> Offload:
        """Write the decision; `copies` are what moves, with the ticks that begin and end it."""
        seconds = 0.0
        for moved, begins, ends in copies:
            needed = moved.size_bytes / self.cost.host_bytes_per_s
            hidden = self._computing(begins, ends) if self.cost.copies_overlap else 0.0
            seconds += max(0.0, needed - hidden)
        return Offload(
            tensors=tuple(s.position for s in order),
            host_bytes=sum(s.size_bytes for s in order),
            transfer_seconds=seconds,
        )

    def _computing(self, begins: int, ends: int) -> float:
        """Return the seconds of the ops between two ticks."""
        first, stop = bisect_right(self._ticks, begins), bisect_left(self._ticks, ends)
        return self._seconds_until[max(first, stop)] - self._seconds_until[first]
