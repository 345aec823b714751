"""Simulate: one training step with a plan under fake tensors, exact to the byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from remat.cost.workspace import measure_workspace
from remat.planner.records import Plan
from remat.prove.records import MemorySample, Simulation
from remat.prove.story import tell_story
from remat.regions.apply import apply, host_peak_bytes, is_applied
from remat.trace.capture import capture
from remat.trace.memory import breakdown_at, by_module_at, memory_by_kind, peak_tick
from remat.trace.records import PHASES, OpSignature, StepTrace
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike

# Any: batches are the user's own types.

_NUM_SAMPLES = 240


def simulate(
    model: nn.Module,
    batch: Any,
    plan: Plan | None = None,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    device: torch.device | None = None,
    workspace: Mapping[OpSignature, int] | None = None,
    blocks: Sequence[str] | None = None,
) -> Simulation:
    """Run one training step under fake tensors and return its peak and memory curve.

    Nothing is allocated and the model is left as found. Without a plan, the step runs as the model
    stands. `workspace` are bytes that kernels take for themselves (see `remat.cost`); they are
    measured for convolutions where the device is at hand and none are given. With `blocks`,
    names of modules in forward order such as `story_blocks` chooses, the result also says which of
    them works when, and what each holds meanwhile.
    """
    if plan is None or is_applied(model):
        trace = capture(
            model, batch, loss=loss, optimizer=optimizer, drop_saved=False, device=device
        )
        host_bytes = host_peak_bytes(model)
    else:
        with apply(model, plan):
            trace = capture(
                model, batch, loss=loss, optimizer=optimizer, drop_saved=False, device=device
            )
            host_bytes = host_peak_bytes(model)
    if workspace is None:
        workspace = measure_workspace(trace.signatures) if trace.device_type == "cpu" else {}
    simulation = summarize(trace, workspace, host_bytes)
    if blocks is None:
        return simulation
    return simulation.model_copy(update={"story": tell_story(trace, blocks, workspace)})


def summarize(
    trace: StepTrace, workspace: Mapping[OpSignature, int], host_bytes: int = 0
) -> Simulation:
    """Reduce a trace made without `drop_saved` to its peak and a sampled memory curve."""
    curves = memory_by_kind(trace, workspace)
    tick = peak_tick(curves)
    breakdown = breakdown_at(curves, tick)
    total = np.sum(list(curves.values()), axis=0)
    phases = [(trace.phase_start[p], p) for p in PHASES if p in trace.phase_start]
    samples = []
    for stretch in np.array_split(np.arange(trace.num_ticks), min(_NUM_SAMPLES, trace.num_ticks)):
        # The highest tick of a stretch stands for it, so that the peak is in the picture.
        highest = int(stretch[np.argmax(total[stretch])])
        phase = next((p for start, p in reversed(phases) if start <= highest), PHASES[0])
        samples.append(MemorySample(phase=phase, bytes_by_kind=breakdown_at(curves, highest)))
    return Simulation(
        peak_bytes=sum(breakdown.values()),
        breakdown=breakdown,
        samples=tuple(samples),
        host_bytes=host_bytes,
        by_module=by_module_at(trace, tick, breakdown),
    )
