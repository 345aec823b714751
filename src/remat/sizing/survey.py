"""What fits where: each device's largest batch with nothing, all blocks or a plan recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from remat.cost.devices import Device
from remat.errors import BudgetError, CaptureError, WorkloadError
from remat.fit import Progress
from remat.program import Program, Step
from remat.prove.accounting import CONTEXT, target_of
from remat.regions.fingerprint import device_type_of
from remat.sizing.deepening import SHALLOW, deepen
from remat.sizing.offers import Price
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
# Where two shallow traces and one made of them take less than the model's own.
_LEAST_LAYERS = 3 * SHALLOW


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be sized: a model, and batches of it by the size in question.

    Arguments
    ---------
    make_batch: from a size to a batch, real or abstract.
    asked: the size that the workload itself has.
    examples: from a size to the examples in a batch: itself where the batch is sized.
    small, large: the sizes that are traced, from which others follow; not used where `is_affine`
        is false: then every size that is looked at is traced.
    unit: sizes are multiples of it.
    most: the largest size that makes sense.
    most_of: what sets it, for people.
    make_model: from a size to a model, where the model depends on it.
    with_layers: from a number of layers to such a model, where traces of many layers may follow
        from those of few.
    layers: how many layers the model has; the size, where `with_layers` is `make_model`.
    """

    name: str
    model: nn.Module
    make_batch: Callable[[int], Any]
    asked: int
    dimension: str = "batch"
    examples: Callable[[int], int] = lambda size: size
    small: int = _SMALL
    large: int = _LARGE
    unit: int = 1
    most: int = LARGEST
    most_of: str = "the search ends there"
    is_affine: bool = True
    make_model: Callable[[int], nn.Module] | None = None
    with_layers: Callable[[int], nn.Module] | None = None
    layers: int = 0
    loss: Loss | None = None
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER
    shards: int = 1
    traces: dict[tuple[Target | None, int], StepTrace] = field(default_factory=dict)

    def model_of(self, size: int) -> nn.Module:
        """Return the model that a step of one size trains."""
        return self.model if self.make_model is None else self.make_model(size)

    def trace(self, target: Target | None, size: int) -> StepTrace:
        """Trace a step of one size; each is traced once for each kind of device."""
        key = (target, size)
        if key not in self.traces:
            found = self._deepened(target, size)
            self.traces[key] = found or self._captured(target, size, self.model_of(size))
        return self.traces[key]

    def _deepened(self, target: Target | None, size: int) -> StepTrace | None:
        """Put the trace of a deep model together from those of shallow ones, if layers are alike.

        For a number of layers as the size, the shallow ones serve every depth; else they are of
        use where the model is much deeper than both together.
        """
        if self.with_layers is None:
            return None
        if self.with_layers is self.make_model:
            if size <= SHALLOW + 1:
                return None
            shallow, deeper = (self.trace(target, SHALLOW + more) for more in (0, 1))
            return deepen(shallow, deeper, size - SHALLOW)
        if self.layers < _LEAST_LAYERS:
            return None
        shallow, deeper = (
            self._captured(target, size, self.with_layers(SHALLOW + more)) for more in (0, 1)
        )
        return deepen(shallow, deeper, self.layers - SHALLOW)

    def _captured(self, target: Target | None, size: int, model: nn.Module) -> StepTrace:
        return capture(
            model, self.make_batch(size), loss=self.loss, optimizer=self.optimizer, target=target
        )


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
    largest = max(devices, key=lambda device: device.available_bytes)
    if not Sizer(subject, largest, largest.available_bytes).may_fit(subject.unit):
        _refuse(subject, largest)
    for number, device in enumerate(devices):
        report(f"sizing {device.name}", number / len(devices))
        found, note = _device_sizes(subject, device)
        price = (prices or {}).get(device.name)
        rows.append(_priced(subject, device, found, price, examples_per_epoch))
        notes += [note] if note and note not in notes else []
    report("done", 1.0)
    if not any(size.largest for row in rows for size in row.sizes):
        _refuse(subject, largest)
    top = max(size.largest for row in rows for size in row.sizes)
    if top + subject.unit > subject.most:
        notes.append(f"No {subject.dimension} above {top:,} was tried: {subject.most_of}.")
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
        if subject.is_affine:
            self._scaled = self._between(subject.small, subject.large)
        self._at = functools.lru_cache(maxsize=8)(self._program)
        self._floor = functools.lru_cache(maxsize=8)(self._base_bytes)

    def _between(self, small: int, large: int) -> ScaledTraces:
        first, second = (self._subject.trace(self._target, size) for size in (small, large))
        return ScaledTraces(first, second, small, large)

    def may_fit(self, size: int) -> bool:
        """Whether what no choice avoids fits: parameters, optimizer state, buffers, the batch."""
        return self._floor(size) <= self.available_bytes

    def _base_bytes(self, size: int) -> int:
        return shard(self._trace(size), self._subject.shards).base_bytes

    def _trace(self, size: int) -> StepTrace:
        if self._subject.is_affine:
            return self._scaled.at(size)
        return self._subject.trace(self._target, size)

    def program(self, mode: Mode, size: int) -> Program:
        """Return the step of a size, with the options that a mode chooses from."""
        return self._at(size, only_blocks=mode is not Mode.PLANNED)

    def _program(self, size: int, *, only_blocks: bool) -> Program:
        subject = self._subject
        trace, made = self._trace(size), subject.small if subject.is_affine else size
        # The trace stands for the step: the batch itself, which may be large, is not made.
        step = Step(
            subject.model_of(size), subject.make_batch(made), subject.loss, subject.optimizer
        )
        return Program(
            step, device=self._device, cost=None, time_limit_s=_SOLVE_S,
            report=lambda _what, _share: None, trace=shard(trace, subject.shards),
            only_blocks=only_blocks,
        )  # fmt: skip

    def needed(self, mode: Mode, size: int) -> int:
        """Return the bytes that a step needs in a mode; of `PLANNED`, the least of all modes."""
        program = self.program(mode, size)
        needed = program.estimated(_least(mode, program))
        if mode is Mode.PLANNED:
            # The least peak by the timeline first; reserved bytes may order choices otherwise.
            for other in (Mode.ALL_BLOCKS, Mode.NOTHING):
                if needed > self.available_bytes:
                    needed = min(needed, program.estimated(_least(other, program)))
        return needed

    def largest(self, mode: Mode, at_least: int = 0) -> int:
        """Return the largest size that fits in a mode, 0 if none does."""
        unit = self._subject.unit
        if not self.may_fit(unit):
            return 0
        return unit * largest_fitting(
            lambda units: self.needed(mode, units * unit),
            self.available_bytes,
            empty=self._floor(unit),
            at_least=at_least // unit,
            most=self._subject.most // unit,
        )

    def best_choice(self, mode: Mode, size: int) -> tuple[Program, frozenset[int]]:
        """Return what a mode recomputes at a size; of `PLANNED`, the cheapest that fits.

        Where no choice can fit, that is the one of all blocks: none is worth a search.
        """
        if mode is Mode.PLANNED and not self.may_fit(size):
            mode = Mode.ALL_BLOCKS
        program = self.program(mode, size)
        if mode is not Mode.PLANNED:
            return program, _least(mode, program)
        found = program.cheapest_that_fits(self.available_bytes, program.estimated)
        if found is not None:
            return program, found.chosen
        return program, min((_least(m, program) for m in Mode), key=program.estimated)

    def refine(self, size: int) -> bool:
        """Trace the step of a size itself; say whether it differs from what was taken for it."""
        said, real = self._scaled.at(size), self._subject.trace(self._target, size)
        bytes_said, bytes_real = (sum(s.size_bytes for s in t.storages) for t in (said, real))
        if abs(bytes_said - bytes_real) <= _AFFINE * bytes_real:
            return False
        self._scaled = self._between(self._subject.small, size)
        self._at.cache_clear()
        return True


def _least(mode: Mode, program: Program) -> frozenset[int]:
    """Return what a mode recomputes; of `PLANNED`, what has the least peak."""
    if mode is Mode.NOTHING:
        return frozenset()
    if mode is Mode.ALL_BLOCKS:
        return frozenset(program.blocks)
    return program.least_choice().chosen


def _device_sizes(subject: Subject, device: Device) -> tuple[list[Size], str]:
    sizer = Sizer(subject, device, device.available_bytes)
    sizes = _sizes(subject, sizer)
    top = max(size.largest for size in sizes)
    note = ""
    if subject.is_affine and top > subject.large:
        if len(subject.trace(sizer._target, subject.small).ops) > _MOST_OPS_CONFIRMED:
            note = (
                f"Sizes follow from traces of {subject.small} and {subject.large}; no larger one "
                "was traced, as this model takes long."
            )
        else:
            try:
                differs = sizer.refine(top)
            except CaptureError as error:
                note = f"Sizes follow from small ones; {top} was not traced itself: {error}"
            else:
                if differs:
                    sizes = _sizes(subject, sizer)
                    note = (
                        "Some bytes grow faster than the batch: sizes were searched again from "
                        "above."
                    )
    return sizes, note


def _sizes(subject: Subject, sizer: Sizer) -> list[Size]:
    sizes: list[Size] = []
    for mode in Mode:
        known = max((s.largest for s in sizes), default=0) if mode is Mode.PLANNED else 0
        largest = sizer.largest(mode, known)
        at = max(largest, subject.unit)
        program, chosen = sizer.best_choice(mode, at)
        seconds = program.cost.step_seconds + program.solver.cost(chosen)
        again = sum(program.options[p].seconds for p in chosen)
        sizes.append(
            Size(
                mode=mode,
                largest=largest,
                needed_bytes=program.estimated(chosen),
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
        is_price_verified=price is None or price.is_verified,
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
    least = subject.unit
    # Where no choice can fit, the peak of all blocks tells as much as a search for the least.
    mode = Mode.PLANNED if sizer.may_fit(least) else Mode.ALL_BLOCKS
    needed, program = sizer.needed(mode, least), sizer.program(mode, least)
    blame: dict[str, int] = {}
    for storage in program.trace.storages:
        if storage.birth == 0:
            blame[storage.kind] = blame.get(storage.kind, 0) + storage.size_bytes
    state = sum(s.size_bytes for s in program.trace.storages if s.kind == "optimizer")
    gradients = sum(s.size_bytes for s in program.trace.storages if s.kind == "gradients")
    blame |= {"optimizer": state, "gradients": gradients}
    if program.accounting.outside_bytes:
        blame[CONTEXT] = program.accounting.outside_bytes
    blame["the step itself"] = max(0, needed - sum(blame.values()))
    error = BudgetError(device.available_bytes, needed, blame)
    activations = blame["the step itself"]
    sentence = f"not even a {subject.dimension} of {least} fits on {device.name} with everything "
    sentence += f"recomputed: {error.args[0]} Training sharded over several "
    sentence += "devices (--shards N) divides parameters, gradients and optimizer state"
    if needed - device.available_bytes <= activations:
        sentence += (
            f"; offloading to host memory (`remat plan --host-budget`) could take what is missing "
            f"from the {format_bytes(activations)} of activations and temporaries"
        )
    else:
        sentence += (
            f"; offloading to host memory cannot help alone: only {format_bytes(activations)} are "
            "activations and temporaries"
        )
    error.args = (f"{sentence}.",)
    raise error
