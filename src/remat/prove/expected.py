"""What the allocator is asked for under a choice of regions, from one trace, without another."""

from __future__ import annotations

from remat.planner.timeline import Timeline
from remat.prove.reserved import Event, event_order
from remat.trace.records import BASE_KINDS


def timeline_events(timeline: Timeline, chosen: frozenset[int]) -> tuple[Event, ...]:
    """List the allocations and frees of a step under the chosen options, in order.

    Those of the step itself where nothing is chosen; else the working set of a recomputation is
    taken as one block.
    """
    fresh = len(timeline.trace.storages)
    spans: list[tuple[int, int, int, int]] = []  # storage, bytes, first and last tick
    for number, storage in enumerate(timeline.trace.storages):
        if storage.kind in BASE_KINDS or storage.size_bytes == 0:
            continue
        original, copies = timeline.intervals(number, chosen)
        for start, end in original:
            spans.append((number, storage.size_bytes, start, end))
        for start, end in copies:
            spans.append((fresh, storage.size_bytes, start, end))
            fresh += 1
    for position in chosen:
        option = timeline.options[position]
        working = tuple((tick, tick, size) for tick, size in option.replays)
        for start, end, size in (*option.kept, *working):
            if size > 0:
                spans.append((fresh, size, start, end))
                fresh += 1
    events = [
        Event(tick, is_free, number, size)
        for number, size, start, end in spans
        for tick, is_free in ((start, False), (end, True))
    ]
    return tuple(sorted(events, key=event_order))
