"""Measured costs: each op of a step timed by itself on the device at hand."""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from remat.cost.devices import Device, find_device
from remat.cost.model import CostModel
from remat.cost.replay import replay
from remat.trace.capture import capture
from remat.trace.records import OpSignature, StepTrace
from remat.trace.standin import random_states, restore_random_states
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike

# Any: batches are the user's own types.

_log = logging.getLogger(__name__)

_LONGEST_PER_OP_S = 0.1
_MOST_REPEATS = 15
_COPIED_BYTES = 2**24


def measure_cost(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    device: Device | str | None = None,
    time_limit_s: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> CostModel:
    """Time every distinct op of a training step on this machine; pass the result to `plan(cost=)`.

    The step is traced, and each op that does more than look at memory is run by itself on made-up
    values of the same shapes: once to warm up, then until a tenth of a second or fifteen repeats;
    the median counts, dispatch included. Ops are taken in the order of what the roofline says they
    cost, until `time_limit_s`; the rest keep the roofline's price. Copies to and from host memory
    are timed too.
    """
    trace = capture(model, batch, loss=loss, optimizer=optimizer)
    row = device if isinstance(device, Device) else find_device(device or trace.device_type)
    generators = random_states()
    try:
        seconds = _time_ops(trace, CostModel(device=row), time_limit_s, clock)
    finally:
        restore_random_states(generators)
    speed = time_host_copies(torch.device(trace.device_type), clock)
    return CostModel(device=row, seconds=seconds, host_bytes_per_s=speed)


def time_host_copies(device: torch.device, clock: Callable[[], float]) -> float:
    """Return the bytes per second of a copy to host memory, the median of a few."""
    there = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    here = torch.ones(_COPIED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    times = []
    for _ in range(_MOST_REPEATS):
        start = clock()
        here.copy_(there, non_blocking=True)
        _wait(device)
        times.append(clock() - start)
    return _COPIED_BYTES / max(statistics.median(times), 1e-9)


def _time_ops(
    trace: StepTrace, roofline: CostModel, time_limit_s: float, clock: Callable[[], float]
) -> dict[OpSignature, float]:
    expected: Counter[int] = Counter()
    for op in trace.ops:
        if not op.is_view:
            expected[op.signature] += round(
                1e9 * roofline.op_seconds(op, trace.signatures[op.signature])
            )
    device = torch.device(trace.device_type)
    found: dict[OpSignature, float] = {}
    deadline = clock() + time_limit_s
    for number, _ in expected.most_common():
        if clock() > deadline:
            _log.warning(
                "%d of %d op shapes were timed within %.0f s; the others keep their estimate",
                len(found), len(expected), time_limit_s,
            )  # fmt: skip
            break
        signature = trace.signatures[number]
        try:
            seconds = time_op(signature, device, clock)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            _log.info("%s could not be timed by itself: %s", signature.name, error)
            continue
        if seconds is not None:
            found[signature] = seconds
    return found


def time_op(
    signature: OpSignature, device: torch.device, clock: Callable[[], float]
) -> float | None:
    """Time one op by itself, dispatch included; `None` where it cannot run alone."""
    run = replay(signature, device)
    if run is None:
        return None
    run()
    _wait(device)
    times: list[float] = []
    begin = clock()
    while len(times) < _MOST_REPEATS and (not times or clock() - begin < _LONGEST_PER_OP_S):
        start = clock()
        run()
        _wait(device)
        times.append(clock() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
