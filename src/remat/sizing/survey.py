"""What fits where: each device's largest batch with nothing, all blocks or a plan recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from remat.cost.devices import Device
from remat.errors import BudgetError, WorkloadError
from remat.fit import Progress
from remat.program import Program, Step
from remat.prove.accounting import target_of
from remat.regions.fingerprint import device_type_of
from remat.sizing.estimate import needed_bytes
from remat.sizing.prices import Price
from remat.sizing.records import DeviceFit, Mode, Size, Survey
from remat.sizing.scaling import ScaledTraces
from remat.sizing.search import LARGEST, largest_fitting
from remat.sizing.sharding import shard
from remat.trace.capture import capture
from remat.trace.records import StepTrace
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike
from remat.trace.target import Target
from remat.units import format_bytes

# Any: batches are the user's own types.

_SMALL, _LARGE = 2, 4
# Bytes of the largest step's own trace against what two small ones say of it.
_AFFINE = 0.01
# Above this many ops a third trace takes longer than it is worth waiting for.
_MOST_OPS_CONFIRMED = 10_000
_SOLVE_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be sized: a model, and batches of it by the size in question.

    Arguments
    ---------
    make_batch: from a size to a batch, real or abstract.
    asked: the size that the workload itself has.
    examples: from a size to the examples in a batch: itself where the batch is sized.
    small, large: the sizes that are traced.
    most: the largest size that makes sense.
    """

    name: str
    model: nn.Module
    make_batch: Callable[[int], Any]
    asked: int
    dimension: str = "batch"
    examples: Callable[[int], int] = lambda size: size
    small: int = _SMALL
    large: int = _LARGE
    most: int = LARGEST
    loss: Loss | None = None
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER
    shards: int = 1
    traces: dict[tuple[Target | None, int], StepTrace] = field(default_factory=dict)

    def trace(self, target: Target | None, size: int) -> StepTrace:
        """Trace a step of one size; each is traced once for each kind of device."""
        known = self.traces.get((target, size))
        if known is None:
            known = self.traces[target, size] = capture(
                self.model, self.make_batch(size), loss=self.loss, optimizer=self.optimizer,
                target=target,
            )  # fmt: skip
        return known


def survey(
    subject: Subject,
    devices: Sequence[Device],
    *,
    prices: Mapping[str, Price] | None = None,
    examples_per_epoch: int | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Say for each device what fits, how fast it is, and what an epoch takes and costs.

    The step is traced for two small sizes and each kind of device; any other size follows, as bytes
    and FLOPs are affine in it. The largest found is traced as well: where it disagrees, sizes are
    searched again from there. With `subject.shards`, training is fully sharded over so many.

    Raises
    ------
    BudgetError: if not one example fits on any device, however much is recomputed: says how much is
        missing on the largest, what fills it, and what would help.
    """
    report = progress or (lambda _what, _share: None)
    if not devices:
        raise WorkloadError("no device is named: give at least one.")
    rows, notes = [], []
    for number, device in enumerate(devices):
        report(f"sizing {device.name}", number / len(devices))
        found, note = _device_sizes(subject, device)
        price = (prices or {}).get(device.name)
        rows.append(_priced(subject, device, found, price, examples_per_epoch))
        notes += [note] if note and note not in notes else []
    report("done", 1.0)
    if not any(size.largest for row in rows for size in row.sizes):
        _refuse(subject, max(devices, key=lambda device: device.available_bytes))
    if subject.shards > 1:
        notes.append("Communication between shards takes no time here.")
    return Survey(
        workload=subject.name,
        dimension=subject.dimension,
        asked=subject.asked,
        shards=subject.shards,
        examples_per_epoch=examples_per_epoch,
        cost_source="roofline of each device: a bound from below",
        devices=tuple(rows),
        cheapest=_cheapest(rows, subject.asked),
        notes=tuple(notes),
    )


class Sizer:
    """One subject on one device, at any size."""

    def __init__(self, subject: Subject, device: Device, available_bytes: int) -> None:
        self._subject = subject
        self._device = device
        self.available_bytes = available_bytes
        self._target = target_of(device, device_type_of(subject.model))
        self._scaled = self._between(subject.small, subject.large)
        self.at = functools.lru_cache(maxsize=8)(self._program)

    def _between(self, small: int, large: int) -> ScaledTraces:
        first, second = (self._subject.trace(self._target, size) for size in (small, large))
        return ScaledTraces(first, second, small, large)

    def _program(self, size: int) -> Program:
        subject = self._subject
        trace = self._scaled.at(size)
        # The trace stands for the step: the batch itself, which may be large, is not made.
        step = Step(
            subject.model, subject.make_batch(subject.small), subject.loss, subject.optimizer
        )
        return Program(
            step, device=self._device, cost=None, time_limit_s=_SOLVE_S,
            report=lambda _what, _share: None, trace=shard(trace, subject.shards),
        )  # fmt: skip

    def chosen(self, mode: Mode, size: int) -> frozenset[int]:
        """Return the options of a mode; of `PLANNED`, those with the least peak."""
        program = self.at(size)
        if mode is Mode.NOTHING:
            return frozenset()
        if mode is Mode.ALL_BLOCKS:
            return frozenset(program.blocks)
        return program.solver.least_peak([frozenset(program.blocks)]).chosen

    def needed(self, mode: Mode, size: int) -> int:
        """Return the bytes that a step needs in a mode; of `PLANNED`, the least of all modes."""
        if mode is not Mode.PLANNED:
            return needed_bytes(self.at(size), self.chosen(mode, size))
        # The least peak by the timeline first; reserved bytes may order choices otherwise.
        least = needed_bytes(self.at(size), self.chosen(mode, size))
        for other in (Mode.ALL_BLOCKS, Mode.NOTHING):
            if least <= self.available_bytes:
                break
            least = min(least, needed_bytes(self.at(size), self.chosen(other, size)))
        return least

    def largest(self, mode: Mode, at_least: int = 0) -> int:
        """Return the largest size that fits in a mode, 0 if none does."""
        needed = functools.partial(self.needed, mode)
        return largest_fitting(
            needed, self.available_bytes, at_least=at_least, most=self._subject.most
        )

    def best_choice(self, mode: Mode, size: int) -> frozenset[int]:
        """Return what a mode recomputes at a size; of `PLANNED`, the cheapest that fits."""
        if mode is not Mode.PLANNED:
            return self.chosen(mode, size)
        program = self.at(size)
        known = [self.chosen(m, size) for m in Mode]
        allowed = program.accounting.allowed_bytes(self.available_bytes)
        for _ in range(4):
            found = program.solver.cheapest(allowed, known)
            if found is None:
                break
            excess = needed_bytes(program, found.chosen) - self.available_bytes
            if excess <= 0:
                return found.chosen
            allowed -= excess
        return min(known, key=lambda chosen: needed_bytes(program, chosen))

    def refine(self, size: int) -> bool:
        """Trace the step of a size itself; say whether it differs from what was taken for it."""
        said, real = self._scaled.at(size), self._subject.trace(self._target, size)
        bytes_said, bytes_real = (sum(s.size_bytes for s in t.storages) for t in (said, real))
        if abs(bytes_said - bytes_real) <= _AFFINE * bytes_real:
            return False
        self._scaled = self._between(self._subject.small, size)
        self.at.cache_clear()
        return True


def _device_sizes(subject: Subject, device: Device) -> tuple[list[Size], str]:
    sizer = Sizer(subject, device, device.available_bytes)
    sizes = _sizes(subject, sizer)
    top = max(size.largest for size in sizes)
    note = ""
    if top > subject.large:
        if len(subject.trace(sizer._target, subject.small).ops) > _MOST_OPS_CONFIRMED:
            note = (
                f"Sizes follow from traces of {subject.small} and {subject.large}; no larger one "
                "was traced, as this model takes long."
            )
        elif sizer.refine(top):
            sizes = _sizes(subject, sizer)
            note = "Some bytes grow faster than the batch: sizes were searched again from above."
    return sizes, note


def _sizes(subject: Subject, sizer: Sizer) -> list[Size]:
    sizes: list[Size] = []
    for mode in Mode:
        known = max((s.largest for s in sizes), default=0) if mode is Mode.PLANNED else 0
        largest = sizer.largest(mode, known)
        at = max(largest, 1)
        program = sizer.at(at)
        chosen = sizer.best_choice(mode, at)
        seconds = program.cost.step_seconds + program.solver.cost(chosen)
        again = sum(program.options[p].seconds for p in chosen)
        sizes.append(
            Size(
                mode=mode,
                largest=largest,
                needed_bytes=needed_bytes(program, chosen),
                step_seconds=seconds,
                recompute_fraction=again / program.cost.forward_seconds,
                samples_per_second=subject.examples(at) * subject.shards / seconds,
            )
        )
    return sizes


def _priced(
    subject: Subject,
    device: Device,
    sizes: list[Size],
    price: Price | None,
    examples_per_epoch: int | None,
) -> DeviceFit:
    rows = []
    for size in sizes:
        seconds = None
        if examples_per_epoch is not None and size.largest:
            seconds = examples_per_epoch / size.samples_per_second
        usd = None
        if price is not None and seconds is not None:
            usd = seconds / 3600 * price.usd_per_hour * subject.shards
        rows.append(size.model_copy(update={"epoch_seconds": seconds, "epoch_usd": usd}))
    return DeviceFit(
        device=device.name,
        available_bytes=device.available_bytes,
        usd_per_hour=price.usd_per_hour if price is not None else None,
        price_source=f"{price.source}, {price.date}" if price is not None else "",
        sizes=tuple(rows),
    )


def _cheapest(rows: Sequence[DeviceFit], asked: int) -> str | None:
    """Return the device with the lowest price on which the asked size fits in some mode."""
    costs: list[tuple[float, str]] = []
    for row in rows:
        fitting = [size for size in row.sizes if size.largest >= asked]
        if not fitting or row.usd_per_hour is None:
            continue
        epochs = [size.epoch_usd for size in fitting if size.epoch_usd is not None]
        # Without a number of examples, what a thousand of them cost.
        each = [row.usd_per_hour / size.samples_per_second for size in fitting]
        costs.append((min(epochs or each), row.device))
    return min(costs)[1] if costs else None


def _refuse(subject: Subject, device: Device) -> None:
    """Say how much is missing for one example on the largest device, and what would help."""
    sizer = Sizer(subject, device, device.available_bytes)
    needed = sizer.needed(Mode.PLANNED, 1)
    program = sizer.at(1)
    blame: dict[str, int] = {}
    for storage in program.trace.storages:
        if storage.birth == 0:
            blame[storage.kind] = blame.get(storage.kind, 0) + storage.size_bytes
    state = sum(s.size_bytes for s in program.trace.storages if s.kind == "optimizer")
    gradients = sum(s.size_bytes for s in program.trace.storages if s.kind == "gradients")
    blame |= {"optimizer": state, "gradients": gradients}
    rest = needed - sum(blame.values())
    error = BudgetError(device.available_bytes, needed, blame | {"the step itself": max(0, rest)})
    missing = format_bytes(needed - device.available_bytes)
    sentence = f"not even a {subject.dimension} of 1 fits on {device.name} with everything "
    sentence += f"recomputed: {missing} are missing. {error.args[0]} Training sharded over several "
    sentence += "devices (--shards N) divides parameters, gradients and optimizer state."
    error.args = (sentence,)
    raise error
