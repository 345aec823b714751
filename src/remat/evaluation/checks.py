"""What is known of a variant before it is trained: its plan, its peak, its proof, its timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from remat.errors import BudgetError, RematError
from remat.evaluation.contenders import Contender
from remat.evaluation.data import model_device, to_device, training_batches
from remat.evaluation.seeds import seeded
from remat.evaluation.training import optimizer_of, under_plan
from remat.fit import Fit
from remat.planner.records import Plan
from remat.prove.measure import measure
from remat.prove.records import MemorySample
from remat.prove.simulate import simulate
from remat.prove.story_blocks import story_blocks
from remat.prove.verify import verify
from remat.runs.reading import reference_of, relative_time
from remat.runs.records import FrontPoint, Variant, VariantKind, VariantStatus
from remat.trace.step import check_model
from remat.units import parse_budget
from remat.workload import Batch, Workload
from remat.workloads import call_model

# Points of a timeline that are kept: more than a picture of this width can show.
_TIMELINE_POINTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model and the batch that plans are made for, and the workload they come from.

    `fit` holds their traced step, from which every plan of the run is made.
    """

    workload: Workload
    model: nn.Module
    batch: Batch
    seed: int
    fit: Fit


def make_subject(workload: Workload, *, seed: int) -> Subject:
    """Build the model, take the first batch of training, and trace one step.

    Raises
    ------
    WorkloadError, CaptureError: if they make no training step that can be traced.
    """
    with seeded(seed):
        model = call_model(workload)
        check_model(model)
        batch = to_device(next(training_batches(workload, seed=seed, epoch=0)), model_device(model))
        fit = Fit(model, batch, loss=workload.loss, optimizer=optimizer_of(workload))
    return Subject(workload=workload, model=model, batch=batch, seed=seed, fit=fit)


def check_variant(subject: Subject, contender: Contender) -> Variant:
    """Plan, verify, measure and simulate one variant.

    A budget that cannot be reached and a variant that runs out of memory are results, not errors:
    the evaluation goes on without them. An error in the variant without a plan is the workload's
    own and is raised.
    """
    variant = Variant(
        label=contender.label, kind=contender.kind, asked_budget=contender.asked_budget
    )
    try:
        with seeded(subject.seed):
            return _checked(subject, contender, variant)
    except BudgetError as error:
        return variant.model_copy(
            update={
                "status": VariantStatus.INFEASIBLE,
                "budget_bytes": error.budget_bytes,
                "minimum_bytes": error.minimum_bytes,
                "message": str(error),
            }
        )
    except torch.OutOfMemoryError as error:
        return failed(variant, error)
    except RematError as error:
        if contender.kind is VariantKind.REFERENCE:
            raise
        return failed(variant, error)


def failed(variant: Variant, error: Exception) -> Variant:
    """Return the variant with the reason why it could not be run."""
    reason = "out of memory: " if isinstance(error, torch.OutOfMemoryError) else ""
    message = f"{reason}{error}".strip().splitlines()[0]
    return variant.model_copy(update={"status": VariantStatus.FAILED, "message": message})


def planned_front(
    subject: Subject, num_points: int, variants: Sequence[Variant]
) -> tuple[FrontPoint, ...]:
    """Plan the Pareto front; its times are scaled to the steps that were measured.

    The cost of recomputation is an estimate, so each time is the measured step without a plan plus
    the planned share of recomputation, times the factor by which the measured plans took longer
    than theirs. There is no front where the step without a plan was not timed.
    """
    reference = reference_of(variants)
    if reference is None or reference.step_times is None:
        return ()
    step_seconds = reference.step_times.median_seconds
    factor = _extra_time_factor(variants, reference)
    with seeded(subject.seed):
        plans = subject.fit.frontier(num_points)
    return tuple(
        FrontPoint(
            peak_bytes=plan.predicted_peak_bytes,
            step_seconds=step_seconds * (1 + factor * _planned_extra(plan)),
            recompute_fraction=plan.recompute_fraction,
        )
        for plan in sorted(plans, key=lambda plan: plan.predicted_peak_bytes)
    )


def _planned_extra(plan: Plan) -> float:
    """What the plan adds to a step, as a share of the step without it."""
    rewritten = sum(rewrite.added_seconds for rewrite in plan.rewrites)
    return (plan.recompute_seconds + rewritten) / plan.step_seconds


def _extra_time_factor(variants: Sequence[Variant], reference: Variant) -> float:
    """Measured over planned extra time, of all plans together; 1 where noise hides it."""
    pairs = [
        (relative_time(variant, reference), _planned_extra(variant.plan))
        for variant in variants
        if variant.kind is VariantKind.PLANNED and variant.plan is not None
    ]
    timed = [(measured, planned) for measured, planned in pairs if measured is not None]
    measured, planned = sum(pair[0] for pair in timed), sum(pair[1] for pair in timed)
    return measured / planned if measured > 0 and planned > 0 else 1.0


def thin_out(samples: Sequence[MemorySample], limit: int = _TIMELINE_POINTS) -> list[MemorySample]:
    """Keep about `limit` samples: of each run of neighbours in one phase, the one with most bytes.

    The peak is therefore among them, and no phase is lost.
    """
    width = max(1, -(-len(samples) // limit))
    kept: list[MemorySample] = []
    start = 0
    for end in range(1, len(samples) + 1):
        is_last = end == len(samples) or samples[end].phase != samples[start].phase
        if is_last or end - start == width:
            kept.append(max(samples[start:end], key=lambda s: sum(s.bytes_by_kind.values())))
            start = end
    return kept


def _checked(subject: Subject, contender: Contender, variant: Variant) -> Variant:
    model, batch, workload = subject.model, subject.batch, subject.workload
    loss, optimizer = workload.loss, optimizer_of(workload)
    plan = _make_plan(subject, contender)
    is_reference = contender.kind is VariantKind.REFERENCE
    applied = None if is_reference else plan  # the reference is the model as its author wrote it
    blocks = story_blocks(subject.fit.plain.trace)
    simulation = simulate(model, batch, applied, loss=loss, optimizer=optimizer, blocks=blocks)
    with under_plan(model, applied):
        measurement = measure(model, batch, loss=loss, optimizer=optimizer, steps=1)
    verification = None
    if applied is not None:
        verification = verify(model, batch, applied, loss=loss, optimizer=optimizer)
    budget_bytes = None
    if contender.budget is not None:
        budget_bytes = parse_budget(contender.budget, plan.keep_all_peak_bytes)
    return variant.model_copy(
        update={
            "status": VariantStatus.MEASURED,
            "plan": plan,
            "budget_bytes": budget_bytes,
            "predicted_peak_bytes": plan.predicted_peak_bytes,
            "measured_peak_bytes": measurement.peak_bytes,
            "verification": verification,
            "timeline": tuple(thin_out(simulation.samples)),
            "peak_by_module": simulation.by_module,
            "story": simulation.story,
        }
    )


def _make_plan(subject: Subject, contender: Contender) -> Plan:
    if contender.policy is not None:
        return subject.fit.policy(contender.policy)
    assert contender.budget is not None
    return subject.fit.plan(contender.budget)
