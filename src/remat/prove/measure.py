"""Measure: a few real training steps, their peak by the allocator's record and their times."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from remat.errors import WorkloadError
from remat.prove.allocator import least_peak, step_tensors
from remat.prove.records import Measurement
from remat.trace.collectives import local_part
from remat.trace.parallel import gradients_in_buckets, reshard
from remat.trace.standin import attribute_tensors, untouched
from remat.trace.step import (
    DEFAULT_OPTIMIZER,
    Loss,
    OptimizerLike,
    advance,
    check_model,
    differentiate,
    make_optimizer,
)

# Any: batches are the user's own types.


def measure(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    steps: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Run real training steps as the model stands, with a plan on or not.

    One step warms up (and makes the optimizer's state), `steps` are timed, and one more is recorded
    for its peak. Gradients are set to none before each step. Parameters, buffers, gradients and
    random state are put back at the end.

    Raises
    ------
    WorkloadError: if the model, batch, loss or optimizer makes no training step, or is abstract.
    """
    check_model(model)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise WorkloadError(f"steps must be an integer >= 1, got {steps!r}.")
    device = check_real(model, batch)
    with restored(model, batch):
        stepper = make_optimizer(optimizer, model)
        losses: list[float] = []

        def step() -> None:
            value = differentiate(model, batch, loss)
            advance(stepper)
            losses.append(float(value.detach()))

        def clear() -> None:
            model.zero_grad(set_to_none=True)

        clear()
        step()
        seconds = []
        for _ in range(steps):
            clear()
            _wait(device)
            begin = clock()
            step()
            _wait(device)
            seconds.append(clock() - begin)
        peak = least_peak(step, clear, step_tensors(model, batch, stepper), device)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return Measurement(
        peak_bytes=peak.peak_bytes,
        base_bytes=peak.base_bytes,
        step_seconds=tuple(seconds),
        median_seconds=statistics.median(seconds),
        iqr_seconds=quartiles[2] - quartiles[0],
        losses=tuple(losses[: steps + 2]),
        device=str(device),
        source=peak.source,
    )


def check_real(model: nn.Module, batch: Any) -> torch.device:
    """Return the model's device; refuse models and batches without values.

    Raises
    ------
    WorkloadError: for meta and fake tensors.
    """
    if not has_values(model, batch):
        raise WorkloadError(
            "the model or batch has no values (meta or fake tensors), so no real step can run: "
            "plan and simulate accept it, measure and verify need real tensors."
        )
    devices = {t.device for t in model.parameters()}
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def has_values(model: nn.Module, batch: Any) -> bool:
    """Whether model and batch hold numbers, so that a real step can run."""
    from torch._subclasses.fake_tensor import FakeTensor

    tensors = step_tensors(model, batch, None)
    return not any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in tensors)


@contextlib.contextmanager
def restored(model: nn.Module, batch: Any) -> Iterator[None]:
    """Put parameters, buffers, attributes, gradients, batch and random state back, bit for bit."""
    reshard(model)
    kept = (*step_tensors(model, batch, None), *attribute_tensors(model))
    named: dict[int, Tensor] = {id(t): local_part(t) for t in kept}
    values = {key: tensor.detach().to("cpu", copy=True) for key, tensor in named.items()}
    leaves = {id(t): t for t in kept if t.is_leaf}
    gradients = {key: tensor.grad for key, tensor in leaves.items()}
    overwritten = [(view, view.detach().clone()) for view in gradients_in_buckets(model)]
    # A step adds to gradients in place; the user's stay aside until the end.
    for tensor in leaves.values():
        tensor.grad = None
    with untouched(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for key, tensor in named.items():
                    if not torch.equal(tensor, values[key].to(tensor.device)):
                        tensor.copy_(values[key])
                for view, value in overwritten:
                    view.copy_(value)
            for key, tensor in leaves.items():
                tensor.grad = gradients[key]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
