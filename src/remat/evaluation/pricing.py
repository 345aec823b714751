"""What each trained variant costs on each device: gathered from the run, and priced."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from remat.cost.devices import Device, find_device
from remat.cost.model import CostModel, cost_step
from remat.errors import DeviceError, RematError
from remat.evaluation.checks import Subject
from remat.evaluation.data import model_device, num_training_batches
from remat.evaluation.energy import AbstractMeter, find_meter
from remat.evaluation.expense import Costed, Need, Schedule, price_variants
from remat.evaluation.seeds import seeded
from remat.evaluation.training import optimizer_of, train_step, under_plan
from remat.planner.records import Plan
from remat.prove.accounting import Accounting, target_of
from remat.prove.allocator import live_bytes
from remat.regions.fingerprint import device_type_of
from remat.runs.evidence import Expense, Gap
from remat.runs.findings import targets_told
from remat.runs.reading import is_reached, reference_of
from remat.runs.records import Run, Variant, VariantKind, VariantStatus
from remat.sizing.offers import PriceTable
from remat.sizing.prices import load_price_table
from remat.trace.capture import capture
from remat.trace.step import make_optimizer
from remat.workloads import call_model

COMMON_DEVICES = ("T4", "L4", "A100-80GB", "H100-80GB")
# Without a target of the workload's: the last validation loss without a plan, within this share.
_TARGET_MARGIN = 0.01
_JOULE_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpenseOptions:
    """On which devices of the table a run is priced, and from which tables.

    Arguments
    ---------
    devices: names of the device table; the machine that the run is made on comes first in any case.
    prices, device_file: files of the user's, over the tables that come with remat.
    """

    devices: tuple[str, ...] = COMMON_DEVICES
    prices: str | os.PathLike[str] | None = None
    device_file: str | os.PathLike[str] | None = None

    def load(self) -> Pricing:
        """Read the tables and find the devices, before anything is trained.

        Raises
        ------
        DeviceError: if a file is broken (names file, row and field), or a device is not known.
        """
        table = load_price_table(self.prices)
        if isinstance(self.devices, str) or not self.devices:
            raise DeviceError(
                f"devices must list at least one name, such as A100-80GB, got {self.devices!r}."
            )
        found = tuple(find_device(name, self.device_file) for name in self.devices)
        return Pricing(devices=found, table=table)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """Devices and prices, as they were read."""

    devices: tuple[Device, ...]
    table: PriceTable


def price_run(
    run: Run, subject: Subject, options: Pricing
) -> tuple[tuple[Expense, ...], tuple[Gap, ...]]:
    """Price every variant that was timed and trained; what could not be priced is a gap."""
    reference = reference_of(run.variants)
    steps = _steps_per_epoch(run, subject)
    if steps is None:
        return (), (Gap(section="expense", reason="No variant was trained, so none is priced."),)
    here = find_device(device_type_of(subject.model))
    meter = find_meter(model_device(subject.model).type)
    targets = run.targets or ({} if reference is None else _targets_of(reference))
    steps_to = _steps_to(run, targets, steps)
    # The table's figures, also where plans are priced by a calibration of this machine.
    base_seconds = cost_step(subject.fit.plain.trace, CostModel(device=here)).step_seconds
    costed, gaps = [], []
    for variant in run.variants:
        if variant.status is not VariantStatus.FINISHED or variant.step_times is None:
            continue
        assert variant.plan is not None  # a variant that was trained has one
        try:
            needs = _needs(subject, variant, options.devices, here)
        except RematError as error:
            reason = f"Only this machine is priced: {error}"
            gaps.append(Gap(section="expense", variant=variant.label, reason=reason))
            needs = {}
        costed.append(
            Costed(
                variant=variant.label,
                is_reference=variant.kind is VariantKind.REFERENCE,
                step_seconds=variant.step_times.median_seconds,
                roofline_seconds=base_seconds * (1 + _added_share(variant.plan)),
                measured_peak_bytes=variant.measured_peak_bytes,
                needs=needs,
                target_steps=steps_to.get(variant.label),
                joules_per_step=None if meter is None else _joules(subject, variant, meter),
            )
        )
    schedule = Schedule(
        steps_per_epoch=steps, epochs=run.epochs, stored_bytes=_stored_bytes(subject.model),
        target=targets_told(targets),
    )  # fmt: skip
    rows = price_variants(
        costed, options.devices, options.table, schedule, here=here,
        counter="" if meter is None else meter.name,
    )  # fmt: skip
    unpriced = {row.device for row in rows if row.fits and row.usd_per_hour is None}
    gaps += [
        Gap(section="expense", reason=f"The price table has no offer of {name}.")
        for name in sorted(unpriced)
    ]
    return rows, tuple(gaps)


def _added_share(plan: Plan) -> float:
    """What the plan adds to a step by the cost model, as a share of the step without it."""
    rewritten = sum(rewrite.added_seconds for rewrite in plan.rewrites)
    return (plan.recompute_seconds + rewritten) / plan.step_seconds


def _needs(
    subject: Subject, variant: Variant, devices: Sequence[Device], here: Device
) -> Mapping[str, Need]:
    """Trace the variant's step once for each kind of device, and cost it on each.

    Devices of one kind share the trace of the first's kernels, which differ little among them.
    """
    model, plan = subject.model, variant.plan
    applied = None if variant.kind is VariantKind.REFERENCE else plan
    kinds: dict[str, list[Device]] = {}
    for device in devices:
        if device.name != here.name:
            kinds.setdefault(device.kind, []).append(device)
    needs = {}
    for alike in kinds.values():
        with seeded(subject.seed), under_plan(model, applied):
            trace = capture(
                model, subject.batch, loss=subject.workload.loss,
                optimizer=optimizer_of(subject.workload), drop_saved=False,
                target=target_of(alike[0], device_type_of(model)),
            )  # fmt: skip
        for device in alike:
            accounting = Accounting(
                device=device,
                device_type=trace.device_type,
                is_workspace_known=False,
                has_convolutions=any("convolution" in s.name for s in trace.signatures),
            )
            regions = 0 if applied is None else len(applied.regions)
            seconds = cost_step(trace, CostModel(device=device)).step_seconds
            needs[device.name] = Need(
                roofline_seconds=seconds + regions * device.region_overhead_s,
                needed_bytes=accounting.needed_bytes(accounting.simulation(trace, {})),
            )
    return needs


def _joules(subject: Subject, variant: Variant, meter: AbstractMeter) -> float:
    """Count the joules of a step, over a few of them."""
    applied = None if variant.kind is VariantKind.REFERENCE else variant.plan
    with seeded(subject.seed):
        model = call_model(subject.workload)
        optimizer = make_optimizer(optimizer_of(subject.workload), model)
        assert optimizer is not None  # a workload always has one
        with under_plan(model, applied):
            train_step(model, subject.batch, subject.workload, optimizer)
            before = meter.joules()
            for _ in range(_JOULE_STEPS):
                train_step(model, subject.batch, subject.workload, optimizer)
            return (meter.joules() - before) / _JOULE_STEPS


def _steps_per_epoch(run: Run, subject: Subject) -> int | None:
    """Steps of one epoch; of data that come as batches, as many as training made of one.

    `None` where nothing was trained.
    """
    trained = [v for v in run.variants if v.status is VariantStatus.FINISHED and v.losses]
    if not trained:
        return None
    known = num_training_batches(subject.workload)
    return known or -(-len(trained[0].losses) // run.epochs)


def _stored_bytes(model: nn.Module) -> int:
    return live_bytes((*model.parameters(), *model.buffers()))


def _targets_of(reference: Variant) -> dict[str, float]:
    """Where the workload names no target: the loss that training without a plan ended with."""
    if not reference.quality:
        return {}
    loss = reference.quality[-1].metrics["loss"]
    return {"loss": loss + _TARGET_MARGIN * abs(loss)}


def _steps_to(run: Run, targets: Mapping[str, float], steps_per_epoch: int) -> dict[str, int]:
    """Steps until all targets were reached at once, by variant, where they ever were.

    The run's own were looked for between steps; what follows from its end is known by epochs.
    """
    if run.targets:
        return {v.label: v.steps_to_target for v in run.variants if v.steps_to_target is not None}
    found = {}
    for variant in run.variants if targets else ():
        reached = (q.epoch + 1 for q in variant.quality if is_reached(q, targets))
        if (epochs := next(reached, None)) is not None:
            found[variant.label] = min(epochs * steps_per_epoch, len(variant.losses))
    return found
