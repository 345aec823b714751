"""Every allocation and release on the CPU while a function runs, by the allocator's own record."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch.autograd.profiler import profile

# Any: the profiler's events have no stubs.

_LOG_LEVEL = "KINETO_LOG_LEVEL"
_COLLECTIVES = ("c10d::", "gloo:")


def most_allocated(step: Callable[[], object]) -> int:
    """Return the most bytes that a step's allocations add up to on the CPU at any time.

    What was alive before the step and is freed within it does not count. The profiler knows the
    address of each block, and so which releases are of blocks that it saw allocated; its legacy
    form does not, and reports releases of older blocks with sizes that may be out of date. What a
    collective takes for itself, another thread releases, sometimes unseen: it counts as released
    when the call returns.
    """
    with _quiet(), profile(profile_memory=True) as record:
        step()
    results: Any = record.kineto_results
    events: list[tuple[int, int, int]] = []
    waiting = [(event, 0) for event in reversed(results.experimental_event_tree())]
    while waiting:
        event, released_at = waiting.pop()
        fields = event.extra_fields
        if hasattr(fields, "alloc_size"):
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
            if released_at and fields.alloc_size > 0:
                events.append((released_at, fields.ptr, -fields.alloc_size))
        elif event.name.startswith(_COLLECTIVES):
            released_at = event.end_time_ns
        waiting.extend((child, released_at) for child in reversed(event.children))
    events.sort(key=lambda event: event[0])
    blocks: dict[int, int] = {}
    alive = most = 0
    for _, address, size in events:
        if size > 0:
            blocks[address] = size
            alive += size
            most = max(most, alive)
        else:
            alive -= blocks.pop(address, 0)
    return most


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler, which reads its log level when it is first used, from printing."""
    given = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "99")
    try:
        yield
    finally:
        if given is None:
            del os.environ[_LOG_LEVEL]
