"""What the caching allocator makes of a traced step: requested, allocated and reserved peaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from remat.cost.allocator_rules import AllocatorOptions
from remat.prove.caching import Block, CachingAllocator, OutOfReservedMemoryError
from remat.trace.records import (
    BACKWARD,
    BASE_KINDS,
    FORWARD,
    OPTIMIZER,
    OPTIMIZER_STATE,
    OpSignature,
    StepTrace,
)

# Adam's counters of steps, one scalar for each parameter, stay on the CPU.
_HOST_SCALAR_BYTES = 8
NUM_STEPS = 2
WORKSPACE, LIBRARY = -1, -2


@dataclass(frozen=True, slots=True)
class AllocatorPeaks:
    """The most bytes requested, allocated and reserved; `fits` is whether the limit was kept."""

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    fits: bool = True


@dataclass(frozen=True, slots=True)
class Event:
    """A storage of the trace that is allocated or freed.

    `storage` -1 is a kernel's workspace, what is below are those that libraries keep.
    """

    tick: int
    is_free: bool
    storage: int
    size_bytes: int


Observer = Callable[[Event, Block], None]


def event_order(event: Event) -> tuple[int, bool]:
    """Sort events: within a tick, what is made comes before what is freed."""
    return event.tick, event.is_free


def step_events(
    trace: StepTrace, workspace: Mapping[OpSignature, int] | None = None
) -> tuple[Event, ...]:
    """List what a step allocates and frees on the device, in order.

    For a trace with `drop_saved=False`. What lives through the step (parameters, buffers, batch,
    optimizer state) is left out. Within a tick, outputs come first, then the kernel's workspace,
    then what dies (see NOTE [ Ticks ]).
    """
    ordered: list[tuple[int, int, int, Event]] = []
    for number, storage in enumerate(trace.storages):
        if storage.kind in BASE_KINDS or storage.size_bytes == 0:
            continue
        for start, end in storage.intervals:
            for tick, is_free in ((start, False), (end, True)):
                event = Event(tick, is_free, number, storage.size_bytes)
                ordered.append((tick, 3 if is_free else 0, number, event))
    for number, op in enumerate(trace.ops):
        size = (workspace or {}).get(trace.signatures[op.signature], 0)
        if size:
            ordered.append((op.tick, 1, number, Event(op.tick, False, WORKSPACE, size)))
            ordered.append((op.tick, 2, number, Event(op.tick, True, WORKSPACE, size)))
    ordered.sort(key=lambda item: item[:3])
    return tuple(event for *_, event in ordered)


def replay_step(
    trace: StepTrace,
    options: AllocatorOptions | None = None,
    *,
    workspace: Mapping[OpSignature, int] | None = None,
    library_bytes: int = 0,
    num_steps: int = NUM_STEPS,
) -> AllocatorPeaks:
    """Return the peaks of training steps from a fresh process on.

    The first step starts with parameters, buffers and batch alone; its optimizer makes the state,
    in whatever the forward and backward left free. Each further step starts from the cache that the
    one before left. Gradients are set to none between steps. The peaks are those over all steps:
    what is reserved is never given back by itself, and a warm step allocates the most.

    Arguments
    ---------
    trace: of the step, with `drop_saved=False` and any plan applied.
    options: the allocator's settings, by default PyTorch's own.
    workspace: bytes that kernels take from the allocator while they run.
    library_bytes: what cuBLAS takes and keeps, once for forward and once for backward, whose thread
        has a handle of its own.
    """
    return replay(
        trace, CachingAllocator(options), workspace=workspace, library_bytes=library_bytes,
        num_steps=num_steps,
    )  # fmt: skip


def replay(
    trace: StepTrace,
    allocator: CachingAllocator,
    *,
    workspace: Mapping[OpSignature, int] | None = None,
    library_bytes: int = 0,
    num_steps: int = NUM_STEPS,
    events: Sequence[Event] | None = None,
    observe: Observer = lambda _event, _block: None,
) -> AllocatorPeaks:
    """Run steps through an allocator; see `replay_step`. `observe` is told of each block.

    `events` are those of the trace itself unless given.
    """
    held: dict[int, Block] = {}

    def allocate(event: Event) -> None:
        held[event.storage] = allocator.allocate(event.size_bytes)
        observe(event, held[event.storage])

    late = [  # made once, when the first step comes to them, and kept
        *_library_events(trace, library_bytes),
        *_base_events(trace, trace.phase_start.get(OPTIMIZER, trace.num_ticks), is_state=True),
    ]
    late.reverse()
    if events is None:
        events = step_events(trace, workspace)
    fits = True
    try:
        for event in _base_events(trace, 0, is_state=False):
            allocate(event)
        for _ in range(num_steps):
            for event in events:
                while late and late[-1].tick <= event.tick:
                    allocate(late.pop())
                if event.is_free:
                    block = held.pop(event.storage)
                    observe(event, block)
                    allocator.free(block)
                else:
                    allocate(event)
            while late:  # of an optimizer that allocates nothing else
                allocate(late.pop())
    except OutOfReservedMemoryError:
        fits = False
    return AllocatorPeaks(
        requested_bytes=allocator.peak_requested_bytes,
        allocated_bytes=allocator.peak_allocated_bytes,
        reserved_bytes=allocator.peak_reserved_bytes,
        fits=fits,
    )


def _base_events(trace: StepTrace, tick: int, *, is_state: bool) -> list[Event]:
    """List what lives through the step: the optimizer's state, or the rest."""
    return [
        Event(tick, False, number, storage.size_bytes)
        for number, storage in enumerate(trace.storages)
        if storage.kind in BASE_KINDS
        and (storage.kind == OPTIMIZER_STATE) is is_state
        and storage.size_bytes > (_HOST_SCALAR_BYTES if is_state else 0)
    ]


def _library_events(trace: StepTrace, library_bytes: int) -> list[Event]:
    """List the workspaces that a library takes and keeps, by the phase whose thread needs one."""
    starts = [trace.phase_start[phase] for phase in (FORWARD, BACKWARD)]
    return [
        Event(tick, False, LIBRARY - number, library_bytes)
        for number, tick in enumerate(starts)
        if library_bytes
    ]
