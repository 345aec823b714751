"""One training run of a workload, under a plan or without, from the same seeds."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from remat.evaluation.data import (
    describe_batch,
    model_device,
    to_device,
    training_batches,
    validation_batches,
)
from remat.evaluation.identity import weights_sha256
from remat.evaluation.quality import measure_quality
from remat.evaluation.seeds import seeded
from remat.planner.records import Plan
from remat.regions.apply import apply
from remat.runs.records import EpochQuality
from remat.trace.step import DEFAULT_OPTIMIZER, OptimizerLike, compute_loss, default_loss
from remat.trace.step import make_optimizer as build_optimizer
from remat.workload import Batch, Workload
from remat.workloads import call_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What one training run gave."""

    losses: tuple[float, ...]
    quality: tuple[EpochQuality, ...]
    weights_sha256: str
    seconds: float
    batch_signatures: frozenset[tuple[str, ...]]


def optimizer_of(workload: Workload) -> OptimizerLike:
    """Optimizer of the workload; a workload that names none is trained with AdamW."""
    return workload.optimizer or DEFAULT_OPTIMIZER


@contextlib.contextmanager
def under_plan(model: nn.Module, plan: Plan | None) -> Iterator[None]:
    """Apply the plan inside the block, remove it after; without a plan, do nothing."""
    if plan is None:
        yield
        return
    handle = apply(model, plan)
    try:
        yield
    finally:
        handle.remove()


def train_step(
    model: nn.Module, batch: Batch, workload: Workload, optimizer: torch.optim.Optimizer
) -> float:
    """Make one step of training and return its loss, which waits for the device."""
    optimizer.zero_grad(set_to_none=True)
    loss = compute_loss(model, batch, workload.loss)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def train(
    workload: Workload,
    plan: Plan | None,
    *,
    seed: int,
    epochs: int,
    max_steps: int | None = None,
    on_step: Callable[[int], None] = lambda _: None,
    on_epoch: Callable[[], None] = lambda: None,
) -> Training:
    """Build the model, train it under the plan, and measure its quality after every epoch.

    Model, shuffling and random state start from `seed`, and the caller's random state is as before
    when this returns. `max_steps` ends training early, within an epoch too; the quality is then
    measured where it ended.
    """
    losses: list[float] = []
    quality: list[EpochQuality] = []
    signatures: set[tuple[str, ...]] = set()
    start = time.perf_counter()
    with seeded(seed):
        model = call_model(workload)
        device = model_device(model)
        optimizer = build_optimizer(optimizer_of(workload), model)
        assert optimizer is not None  # a workload always has one
        left = math.inf if max_steps is None else max_steps
        with under_plan(model, plan):
            for epoch in range(epochs):
                for batch in _at_most(training_batches(workload, seed=seed, epoch=epoch), left):
                    signatures.add(describe_batch(batch))
                    losses.append(train_step(model, to_device(batch, device), workload, optimizer))
                    left -= 1
                    on_step(len(losses))
                if workload.eval_data is not None:
                    quality.append(_validate(workload, model, device, epoch))
                on_epoch()
                if left <= 0:
                    break
    return Training(
        losses=tuple(losses),
        quality=tuple(quality),
        weights_sha256=weights_sha256(model),
        seconds=time.perf_counter() - start,
        batch_signatures=frozenset(signatures),
    )


def _validate(
    workload: Workload, model: nn.Module, device: torch.device, epoch: int
) -> EpochQuality:
    batches = (to_device(batch, device) for batch in validation_batches(workload))
    return measure_quality(
        model,
        batches,
        loss=workload.loss or default_loss,
        predict=workload.predict,
        epoch=epoch,
    )


def _at_most(batches: Iterator[Batch], limit: float) -> Iterator[Batch]:
    return batches if math.isinf(limit) else itertools.islice(batches, int(limit))
