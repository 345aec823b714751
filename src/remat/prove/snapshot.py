"""A step's allocations in the form of PyTorch's memory snapshot, for the viewer that it comes with.

The form is that of `torch.cuda.memory._snapshot()`: segments with their blocks, and one trace of
events for each device. The viewer (pytorch.org/memory_viz) reads nothing but pickle, which runs
code when a careless reader opens it; so the snapshot is exchanged as JSON, and the pickle is
written only where it is asked for by name. It holds nothing but dicts, lists, text and integers.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remat.cost.allocator_rules import AllocatorOptions
from remat.errors import WorkloadError
from remat.files import write_atomically, write_bytes_atomically
from remat.prove.caching import Block, CachingAllocator
from remat.prove.reserved import NUM_STEPS, Event, replay
from remat.trace.records import TEMPORARIES, OpSignature, StepTrace

# Any: a snapshot is nested dicts and lists, of PyTorch's own form.

_PICKLE_PROTOCOL = 4  # the viewer's reader knows no later one


def memory_snapshot(
    trace: StepTrace,
    options: AllocatorOptions | None = None,
    *,
    workspace: Mapping[OpSignature, int] | None = None,
    library_bytes: int = 0,
    num_steps: int = NUM_STEPS,
) -> dict[str, Any]:
    """Replay steps and return them as a PyTorch memory snapshot of one device.

    Each block carries the op that made it, its module and its kind; time is the trace's tick, and
    annotations say when phases begin.
    """
    options = options or AllocatorOptions()
    events: list[dict[str, Any]] = []
    makers = _makers(trace)
    clock = _Clock(trace.num_ticks)

    def on_segment(action: str, address: int, size: int) -> None:
        events.append(_entry(action, address, size, clock.now, [], ""))

    def observe(event: Event, block: Block) -> None:
        clock.advance(event.tick)
        frames = makers.get(event.storage, [])
        kind = trace.storages[event.storage].kind if event.storage >= 0 else TEMPORARIES
        actions = ("free_requested", "free_completed") if event.is_free else ("alloc",)
        size = event.size_bytes
        events.extend(
            _entry(action, block.address, size, clock.now, frames, kind) for action in actions
        )
        if not event.is_free:
            owners[block.address] = frames

    owners: dict[int, list[dict[str, Any]]] = {}
    allocator = CachingAllocator(options, on_segment)
    replay(
        trace, allocator, workspace=workspace, library_bytes=library_bytes, num_steps=num_steps,
        observe=observe,
    )  # fmt: skip
    segments = [_segment(block, options, owners) for block in allocator.segments.values()]
    return {
        "segments": [segment for segment in segments if segment["total_size"]],
        "device_traces": [events],
        "external_annotations": _phases(trace, num_steps),
        "allocator_settings": {
            "PYTORCH_ALLOC_CONF": "",
            "max_split_size": -1
            if options.max_split_size_bytes is None
            else options.max_split_size_bytes,
            "garbage_collection_threshold": options.garbage_collection_threshold,
            "expandable_segments": options.expandable_segments,
            "roundup_power2_divisions": options.roundup_power2_divisions,
        },
    }


def save_snapshot(snapshot: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a snapshot: JSON to a name that ends in `.json`, pickle to one that ends in `.pickle`.

    Raises
    ------
    WorkloadError: for any other ending.
    """
    suffix = Path(path).suffix
    if suffix == ".json":
        return write_atomically(path, json.dumps(snapshot) + "\n")
    if suffix == ".pickle":
        return write_bytes_atomically(path, pickle.dumps(snapshot, protocol=_PICKLE_PROTOCOL))
    raise WorkloadError(
        f"memory timeline {os.fspath(path)!r}: expected a name that ends in .json, or in .pickle "
        "for pytorch.org/memory_viz, which reads nothing else."
    )


class _Clock:
    """Ticks that go on from step to step."""

    def __init__(self, num_ticks: int) -> None:
        self._num_ticks = num_ticks
        self._last = self._before = 0

    def advance(self, tick: int) -> None:
        if tick < self._last:
            self._before += self._num_ticks
        self._last = tick

    @property
    def now(self) -> int:
        return self._before + self._last


def _phases(trace: StepTrace, num_steps: int) -> list[dict[str, Any]]:
    """Say when each phase of each step begins, as PyTorch notes what a profiler was told."""
    return [
        {"name": phase, "stage": "START", "device": 0, "time_us": step * trace.num_ticks + tick}
        for step in range(num_steps)
        for phase, tick in trace.phase_start.items()
    ]


def _makers(trace: StepTrace) -> dict[int, list[dict[str, Any]]]:
    """Say for each storage which op made it, and in which module."""
    frames = {
        number: [_frame(storage.kind, _module(trace, storage.call))]
        for number, storage in enumerate(trace.storages)
    }
    for op in trace.ops:
        for number in op.fresh:
            frames[number] = [_frame(op.name, _module(trace, op.call))]
    return frames


def _module(trace: StepTrace, call: int) -> str:
    return trace.calls[call].module or "the model" if call >= 0 else "the step"


def _frame(name: str, place: str) -> dict[str, Any]:
    return {"name": name, "filename": place, "line": 0}


def _entry(
    action: str, address: int, size: int, tick: int, frames: list[dict[str, Any]], kind: str
) -> dict[str, Any]:
    entry = {
        "action": action, "addr": address, "size": size, "stream": 0, "time_us": tick,
        "frames": frames,
    }  # fmt: skip
    return entry | {"category": kind} if kind else entry


def _segment(
    first: Block, options: AllocatorOptions, owners: Mapping[int, list[dict[str, Any]]]
) -> dict[str, Any]:
    blocks: list[Block] = []
    block: Block | None = first
    while block is not None:
        if block.is_mapped:
            blocks.append(block)
        block = block.next
    used = [b for b in blocks if b.is_used]
    return {
        "device": 0,
        "address": first.address,
        "total_size": sum(b.size for b in blocks),
        "allocated_size": sum(b.size for b in used),
        "active_size": sum(b.size for b in used),
        "requested_size": sum(b.requested for b in used),
        "stream": 0,
        "segment_type": "small" if first.is_small else "large",
        "segment_pool_id": [0, 0],
        "is_expandable": options.expandable_segments,
        "frames": [],
        "blocks": [
            {
                "address": b.address,
                "size": b.size,
                "requested_size": b.requested if b.is_used else 0,
                "state": "active_allocated" if b.is_used else "inactive",
                "frames": owners.get(b.address, []) if b.is_used else [],
            }
            for b in blocks
        ],
    }
