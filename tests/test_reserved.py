"""Steps replayed through the allocator: peaks as simulated, snapshots as torch reads them."""

from __future__ import annotations

import functools
import json
import pickle

import pytest
import torch
from torch import nn

import remat
from remat.cost.allocator_rules import AllocatorOptions
from remat.prove.caching import CachingAllocator
from remat.prove.reserved import replay, replay_step, step_events
from remat.prove.snapshot import memory_snapshot, save_snapshot
from remat.report.memory import memory_story
from remat.trace.capture import capture
from remat.trace.memory import memory_by_kind
from remat.trace.records import CRUMBS_BYTES, OPTIMIZER_STATE

MIB = 1024**2


@functools.cache
def traced(depth: int = 4):
    """A step of a perceptron: (trace, most bytes alive by the simulation)."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(256, 256), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(256, 8))
    batch = torch.randn(512, 256)
    trace = capture(model, batch, loss=lambda m, x: m(x).square().mean(), drop_saved=False)
    curves = memory_by_kind(trace)
    counters = sum(s.size_bytes for s in trace.storages if is_counter(s))
    return trace, int(sum(curves.values()).max()) - CRUMBS_BYTES - counters


def is_counter(storage) -> bool:
    return storage.kind == OPTIMIZER_STATE and storage.size_bytes <= 8


def test_requested_peak_is_the_simulated_peak():
    """What a warm step asks the allocator for is the simulation's peak, to the byte."""
    trace, peak_bytes = traced()
    assert replay_step(trace).requested_bytes == peak_bytes


def test_first_step_has_no_optimizer_state_in_backward():
    """A cold step asks for less: Adam's moments come after the backward pass."""
    trace, _ = traced()
    state = sum(s.size_bytes for s in trace.storages if s.kind == OPTIMIZER_STATE)
    cold, warm = replay_step(trace, num_steps=1), replay_step(trace, num_steps=2)
    assert cold.requested_bytes < warm.requested_bytes <= cold.requested_bytes + state


@pytest.mark.parametrize(
    "options", [AllocatorOptions(), AllocatorOptions(expandable_segments=True)], ids=repr
)
def test_peaks_are_ordered_and_settle(options):
    """Requested <= allocated <= reserved, and further steps reserve nothing more."""
    trace, _ = traced()
    two, six = (replay_step(trace, options, num_steps=n) for n in (2, 6))
    assert two.requested_bytes <= two.allocated_bytes <= two.reserved_bytes
    assert six == two


def test_every_event_is_freed_within_its_step():
    """A step frees what it allocates, so that only the base is in use behind it."""
    trace, _ = traced()
    events = step_events(trace)
    alive = {}
    for event in events:
        if event.is_free:
            del alive[event.storage]
        else:
            assert event.storage not in alive
            alive[event.storage] = event
    assert not alive
    allocator = CachingAllocator()
    replay(trace, allocator)
    base = sum(
        s.size_bytes for s in trace.storages
        if s.kind in ("parameters", "buffers", "batch", "optimizer") and not is_counter(s)
    )  # fmt: skip
    assert allocator.requested_bytes == base


def test_workspace_counts_while_its_op_runs():
    """A kernel's workspace raises the peak where it falls on the peak, and is given back."""
    trace, peak_bytes = traced()
    everywhere = dict.fromkeys(trace.signatures, 4 * MIB)
    assert replay_step(trace, workspace=everywhere).requested_bytes == peak_bytes + 4 * MIB


def test_limit_decides_whether_the_step_fits():
    """A step fits a limit of what it reserves, and none below what it allocates."""
    trace, _ = traced()
    free = replay_step(trace)
    assert replay_step(trace, AllocatorOptions(limit_bytes=free.reserved_bytes)).fits
    tight = AllocatorOptions(limit_bytes=free.allocated_bytes - 2 * MIB)
    assert not replay_step(trace, tight).fits


def test_a_plan_lowers_what_is_reserved():
    """Recomputation lowers the reserved peak as well, by less than the allocated one."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.GELU(), nn.Tanh())]
    model = nn.Sequential(*[nn.Sequential(*layers[i : i + 3]) for i in range(0, 18, 3)])
    batch = torch.randn(4096, 256)
    step = {"loss": lambda m, x: m(x).square().mean()}
    plan = remat.plan(model, batch, "70%", **step)
    keep = replay_step(capture(model, batch, drop_saved=False, **step))
    with remat.apply(model, plan):
        planned = replay_step(capture(model, batch, drop_saved=False, **step))
    assert planned.allocated_bytes < 0.75 * keep.allocated_bytes
    assert planned.reserved_bytes < 0.85 * keep.reserved_bytes


@pytest.mark.parametrize("expandable", [False, True])
def test_snapshot_reads_as_torchs_own(expandable):
    """PyTorch's own readers find in the snapshot the bytes that the replay counted."""
    from torch.cuda import _memory_viz

    trace, _ = traced()
    options = AllocatorOptions(expandable_segments=expandable)
    allocator = CachingAllocator(options)
    replay(trace, allocator)
    snapshot = memory_snapshot(trace, options)
    segments = snapshot["segments"]
    assert sum(s["total_size"] for s in segments) == allocator.reserved_bytes
    assert sum(s["allocated_size"] for s in segments) == allocator.allocated_bytes
    for segment in segments:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    assert "total_allocated" in _memory_viz.segsum(snapshot)
    assert "entries" in _memory_viz.trace(snapshot)
    assert "Active Memory Timeline" in _memory_viz.trace_plot(snapshot)
    peak = alive = 0
    for entry in snapshot["device_traces"][0]:
        alive += {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * entry["size"]
        peak = max(peak, alive)
    assert peak == allocator.peak_requested_bytes
    times = [entry["time_us"] for entry in snapshot["device_traces"][0]]
    assert times == sorted(times)


def test_snapshot_names_op_module_and_kind():
    """Each block says which op made it, in which module, and what kind of memory it is."""
    trace, _ = traced()
    entries = memory_snapshot(trace)["device_traces"][0]
    made = {(e["frames"][0]["name"], e["frames"][0]["filename"], e["category"])
            for e in entries if e["action"] == "alloc"}  # fmt: skip
    assert ("aten.gelu.default", "1", "activations") in made
    assert {"parameters", "gradients", "optimizer", "activations"} <= {kind for *_, kind in made}


def test_page_of_a_step_tells_every_block_of_its_snapshot():
    """Bytes by kind, the peak, what is reserved and each block's life are the snapshot's own."""
    trace, _ = traced()
    allocator = CachingAllocator()
    peaks = replay(trace, allocator)
    story = memory_story(memory_snapshot(trace))
    assert story.peak_bytes == peaks.requested_bytes
    assert max(held for *_, held in story.moments) == peaks.reserved_bytes
    assert [phase for phase, _ in story.phases] == ["forward", "backward", "optimizer"] * 2
    at_peak = sum(b.size_bytes for b in story.blocks if b.start <= story.peak_tick < b.end)
    assert at_peak == story.peak_bytes
    weights = sum(b.size_bytes for b in story.blocks if b.kind == "parameters")
    assert weights == 4 * (4 * 256 * 257 + 8 * 257)
    largest = story.at_peak()
    assert largest[0].size_bytes == max(b.size_bytes for b in largest)


def test_snapshot_is_written_as_json_or_as_pickle(tmp_path):
    """JSON for exchange, pickle only by that ending; both hold the same."""
    trace, _ = traced()
    snapshot = memory_snapshot(trace)
    as_json = save_snapshot(snapshot, tmp_path / "step.json")
    as_pickle = save_snapshot(snapshot, tmp_path / "step.pickle")
    assert json.loads(as_json.read_text()) == snapshot
    assert pickle.loads(as_pickle.read_bytes()) == snapshot
    with pytest.raises(remat.WorkloadError, match=r"ends in \.json, or in \.pickle"):
        save_snapshot(snapshot, tmp_path / "step.txt")
