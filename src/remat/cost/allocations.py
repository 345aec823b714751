"""Every allocation and release on the CPU while a function runs, by the allocator's own record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Any: the profiler's events have no stubs.


def most_allocated(step: Callable[[], object]) -> int:
    """Return the most bytes that a step's allocations add up to on the CPU at any time.

    The legacy profiler is used because it writes one event per allocation in order and prints
    nothing; what was alive before it started and is freed within the step is not seen.
    """
    config = torch.autograd.ProfilerConfig(  # type: ignore[attr-defined]
        torch.autograd.ProfilerState.CPU,  # type: ignore[attr-defined]
        False,
        True,
        False,
        False,
        False,
        torch._C._profiler._ExperimentalConfig(),
    )
    torch.autograd._enable_profiler_legacy(config)  # type: ignore[attr-defined]
    try:
        step()
    finally:
        threads: list[list[Any]] = torch.autograd._disable_profiler_legacy()  # type: ignore[attr-defined]
    start: Any = next((event for events in threads for event in events), None)
    changes: list[tuple[float, int]] = []
    for events in threads:
        changes.extend(
            (start.cpu_elapsed_us(event), event.cpu_memory_usage())
            for event in events
            if event.kind() == "memory_alloc"
        )
    if len(threads) > 1:
        changes.sort(key=lambda change: change[0])
    alive = most = 0
    for _, size in changes:
        alive += size
        most = max(most, alive)
    return most
