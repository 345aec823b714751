"""Serve one trained model in every form: latency, memory, size, quality, and updates beside it."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from remat.evaluation.checks import Subject
from remat.evaluation.contenders import REFERENCE_LABEL as NO_PLAN
from remat.evaluation.data import model_device, to_device, training_batches
from remat.evaluation.serving.describe import describe_forms
from remat.evaluation.serving.export import ONNX, ONNX_DYNAMIC, ONNX_STATIC, Exporter
from remat.evaluation.serving.forms import (
    ATTACHED,
    DETACHED,
    TORCH_INT8,
    Build,
    Form,
    Missing,
    attached_form,
    detached_form,
    make_form,
    torch_int8_form,
    trained_form,
)
from remat.evaluation.serving.found import Found
from remat.evaluation.serving.options import ServingOptions
from remat.evaluation.serving.recommend import recommend
from remat.evaluation.serving.request import (
    Request,
    observe_request,
    sharing_copy,
)
from remat.evaluation.serving.sweep import time_forms
from remat.evaluation.serving.updates import measure_updates
from remat.evaluation.training import optimizer_of, train_step
from remat.planner.records import Plan
from remat.regions.apply import apply
from remat.runs.evidence import Gap, ServedForm, Serving, UpdateStep
from remat.trace.step import make_optimizer

# Any: answers of the user's model.

STEPS = ("export", "describe", "time", "update")
_CALIBRATION_BATCHES = 4


def serve_model(
    subject: Subject,
    build: Build,
    label: str,
    plan: Plan | None,
    options: ServingOptions,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Serving, tuple[Gap, ...]]:
    """Measure how the trained model serves, in a process that has trained before.

    What cannot be measured is a gap or an unavailable form; an error is raised only where the model
    does not answer at all.

    Arguments
    ---------
    build: builds the model with its trained weights; called again for each first request.
    plan: what it was trained under, if anything.
    folder: takes the exported files.
    progress: called with each of `STEPS` as it begins.

    Raises
    ------
    WorkloadError: if predicting does not call the model.
    """
    found = Found()
    progress("export")
    model = build().eval()
    request = observe_request(subject.workload, model, subject.batch)
    forms = _make_forms(subject, model, build, plan, options, request, folder, found)
    progress("describe")
    describe_forms(subject.workload, forms, request, options, found)
    progress("time")
    time_forms(forms, request, options, found)
    progress("update")
    updates = _updates(subject, model, label, plan, request, options, found)
    best, why = recommend(found.forms, found.latencies, options.target_p95_seconds)
    serving = Serving(
        variant=label,
        forms=tuple(found.forms),
        latencies=tuple(found.latencies),
        target_p95_seconds=options.target_p95_seconds,
        recommended_batch_size=None if best is None else best.batch_size,
        recommended_form=None if best is None else best.form,
        recommendation=why,
        updates=updates,
    )
    return serving, tuple(found.gaps)


def _make_forms(
    subject: Subject,
    model: nn.Module,
    build: Build,
    plan: Plan | None,
    options: ServingOptions,
    request: Request,
    folder: Path,
    found: Found,
) -> list[Form]:
    """Make every form that can be made; the others are noted with the reason."""
    made: list[Form | Missing] = [trained_form(model, build)]
    if plan is not None:
        made.append(make_form(ATTACHED, lambda: attached_form(model, build, plan)))
        made.append(make_form(DETACHED, lambda: detached_form(model, build, plan)))
    if options.exports:
        made.append(make_form(TORCH_INT8, lambda: torch_int8_form(model, build)))
        made += _exported(subject, model, request, folder)
    for form in made:
        if isinstance(form, Missing):
            found.forms.append(
                ServedForm(name=form.name, is_available=False, message=form.reason)
            )  # fmt: skip
    return [form for form in made if isinstance(form, Form)]


def _exported(
    subject: Subject, model: nn.Module, request: Request, folder: Path
) -> list[Form | Missing]:
    def calibration() -> list[Request]:
        batches = training_batches(subject.workload, seed=subject.seed, epoch=0)
        device = model_device(model)
        return [
            observe_request(subject.workload, model, to_device(batch, device))
            for batch in itertools.islice(batches, _CALIBRATION_BATCHES)
        ]

    def float32() -> Form:
        exporters.append(Exporter(model, request, folder))
        return exporters[0].float32()

    exporters: list[Exporter] = []
    first = make_form(ONNX, float32)
    if isinstance(first, Missing):
        names = (ONNX_DYNAMIC, ONNX_STATIC)
        return [first, *(Missing(name=name, reason=first.reason) for name in names)]
    return [
        first,
        make_form(ONNX_DYNAMIC, exporters[0].dynamic_int8),
        make_form(ONNX_STATIC, lambda: exporters[0].static_int8(calibration())),
    ]


def _updates(
    subject: Subject,
    model: nn.Module,
    label: str,
    plan: Plan | None,
    request: Request,
    options: ServingOptions,
    found: Found,
) -> tuple[UpdateStep, ...]:
    """Train further, with and without the plan in turn, beside requests of one example."""
    workload = subject.workload
    try:
        served = copy.deepcopy(model).eval()
        variants = {NO_PLAN: sharing_copy(model).train()}
        if plan is not None:
            variants[label] = sharing_copy(model).train()
            apply(variants[label], plan)
        optimizer = make_optimizer(optimizer_of(workload), variants[NO_PLAN])
        assert optimizer is not None  # a workload always has one
        mine, new = (
            (*network.parameters(), *network.buffers()) for network in (served, model)
        )  # fmt: skip
        pairs = list(zip(mine, new, strict=True))

        def publish() -> None:
            for old, trained in pairs:
                old.copy_(trained)

        def step(network: nn.Module) -> object:
            return train_step(network, subject.batch, workload, optimizer)

        updates = measure_updates(
            {name: functools.partial(step, network) for name, network in variants.items()},
            served, request.of(1), publish, seconds=options.update_seconds,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001  requests and steps run the user's code in threads
        found.skip("updates beside requests were not measured", error)
        return ()
    for name in variants.keys() - {update.variant for update in updates}:
        found.skip(f"updates under {name!r} were not measured", "no request came in time")
    return updates
