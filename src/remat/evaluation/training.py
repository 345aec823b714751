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
from remat.evaluation.predictions import Collector, Predictions
from remat.evaluation.quality import measure_quality
from remat.evaluation.reaching import Aim, Clock, Lookout, Reached
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
    """What one training run gave; `predictions` are those after its last epoch."""

    losses: tuple[float, ...]
    quality: tuple[EpochQuality, ...]
    weights_sha256: str
    seconds: float
    batch_signatures: frozenset[tuple[str, ...]]
    predictions: Predictions | None = None
    reached: Reached | None = None


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
    aim: Aim | None = None,
    on_step: Callable[[int], None] = lambda _: None,
    on_epoch: Callable[[], None] = lambda: None,
    on_trained: Callable[[nn.Module], None] = lambda _: None,
) -> Training:
    """Build the model, train it under the plan, and measure its quality after every epoch.

    Model, shuffling and random state start from `seed`, and the caller's random state is as before
    when this returns. `max_steps` ends training early, within an epoch too; the quality is then
    measured where it ended. With an `aim`, quality is looked at between steps as well until all
    targets are reached: the clock rests meanwhile, and no bit of training changes by a look.
    `on_trained` is given the model at the end, with no plan on it.
    """
    losses: list[float] = []
    quality: list[EpochQuality] = []
    signatures: set[tuple[str, ...]] = set()
    predictions: Predictions | None = None
    clock, lookout = Clock(), Lookout(aim)
    start = time.perf_counter()
    with seeded(seed):
        model = call_model(workload)
        device = model_device(model)
        optimizer = build_optimizer(optimizer_of(workload), model)
        assert optimizer is not None  # a workload always has one
        left = math.inf if max_steps is None else max_steps
        with under_plan(model, plan):
            for epoch in range(epochs):
                before, seconds = len(losses), clock.seconds
                with clock.running():
                    for batch in _at_most(training_batches(workload, seed=seed, epoch=epoch), left):
                        # before the next step: the end of the epoch is looked at in any case
                        if len(losses) > before and lookout.is_due(len(losses)):
                            with clock.resting(), seeded(seed):
                                found, _ = _validate(workload, model, device, epoch)
                            lookout.note(found, len(losses), seconds)
                        signatures.add(describe_batch(batch))
                        moved = to_device(batch, device)
                        losses.append(train_step(model, moved, workload, optimizer))
                        left, seconds = left - 1, clock.seconds
                        on_step(len(losses))
                if workload.eval_data is not None:
                    found, predictions = _validate(workload, model, device, epoch)
                    quality.append(found.model_copy(update={"train_seconds": clock.seconds}))
                    lookout.note(found, len(losses), clock.seconds)
                on_epoch()
                if left <= 0:
                    break
    on_trained(model)
    return Training(
        losses=tuple(losses),
        quality=tuple(quality),
        weights_sha256=weights_sha256(model),
        seconds=time.perf_counter() - start,
        batch_signatures=frozenset(signatures),
        predictions=predictions,
        reached=lookout.reached,
    )


def _validate(
    workload: Workload, model: nn.Module, device: torch.device, epoch: int
) -> tuple[EpochQuality, Predictions | None]:
    collector = Collector()
    found = measure_quality(
        model,
        (to_device(batch, device) for batch in validation_batches(workload)),
        loss=workload.loss or default_loss,
        predict=workload.predict,
        epoch=epoch,
        collector=collector,
    )
    return found, collector.finish()


def _at_most(batches: Iterator[Batch], limit: float) -> Iterator[Batch]:
    return batches if math.isinf(limit) else itertools.islice(batches, int(limit))
