"""What each form is: its first request, size, memory, ops, answers and quality."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from remat.evaluation.data import model_device
from remat.evaluation.serving.forms import Form
from remat.evaluation.serving.found import Found, first_line
from remat.evaluation.serving.options import ServingOptions
from remat.evaluation.serving.quality import FormQuality, Yardstick, largest_slice_loss
from remat.evaluation.serving.request import Request, count_ops, largest_difference
from remat.prove.allocator import live_bytes, record_peak, step_tensors
from remat.runs.evidence import ServedForm
from remat.workload import Workload
from remat.workloads import num_examples_in

# Any: answers of the user's model.


def describe_forms(
    workload: Workload,
    forms: list[Form],
    request: Request,
    options: ServingOptions,
    found: Found,
) -> None:
    """Describe every form beside the first one, the model as trained.

    One that does not answer is taken out of `forms`, and noted with the reason. What the model as
    trained raises is raised.
    """
    first, *others = forms
    trained = first.module
    described, answer = _described(first, trained, request, None, found)
    yardstick = Yardstick.of(workload, trained, _most_examples(forms, request, options))
    base = _quality(first, yardstick, found)
    total = num_examples_in(workload.eval_data)
    if base.num_examples and total is not None and base.num_examples < total:
        said = f"Quality on the first {base.num_examples:,} of {total:,} validation examples."
        described = described.model_copy(update={"message": said})
    found.forms.append(_with_quality(described, base, base))
    for form in others:
        described = _described_if_it_answers(form, trained, request, answer, found)
        if described.is_available:
            described = _with_quality(described, _quality(form, yardstick, found), base)
        else:
            forms.remove(form)
        found.forms.append(described)


def _described_if_it_answers(
    form: Form, trained: nn.Module, request: Request, expected: Any, found: Found
) -> ServedForm:
    try:
        return _described(form, trained, request, expected, found)[0]
    except Exception as error:  # noqa: BLE001  a session raises what it likes
        reason = f"made, but does not answer: {first_line(error)}"
        return ServedForm(name=form.name, is_available=False, message=reason)


def _described(
    form: Form, trained: nn.Module, request: Request, expected: Any, found: Found
) -> tuple[ServedForm, Any]:
    """Describe one form but for its quality, and return what it answers."""
    begin = time.perf_counter()
    request.of(1).send(form.start())
    first_request_seconds = time.perf_counter() - begin
    answer = request.send(form.module)
    described = ServedForm(
        name=form.name,
        message=form.message,
        size_bytes=form.size_bytes,
        first_request_seconds=first_request_seconds,
        peak_bytes=_peak_bytes(form, trained, request) if form.is_torch else None,
        resident_bytes=_resident_bytes(form, request, found),
        num_ops=_num_ops(form, request) if form.is_torch else None,
        largest_difference=largest_difference(answer, answer if expected is None else expected),
    )
    return described, answer


def _quality(form: Form, yardstick: Yardstick, found: Found) -> FormQuality:
    try:
        return yardstick.measure(form.module)
    except Exception as error:  # noqa: BLE001  the user's loss may need more of a model than a call
        found.skip(f"quality of {form.name!r} was not measured", error)
        return FormQuality()


def _with_quality(described: ServedForm, quality: FormQuality, base: FormQuality) -> ServedForm:
    said = (described.message, largest_slice_loss(quality, base))
    update = {
        "metrics": quality.metrics,
        "slices": quality.slices,
        "message": " ".join(part for part in said if part),
    }
    return described.model_copy(update=update)


def _most_examples(forms: list[Form], request: Request, options: ServingOptions) -> int:
    """Return on how many validation examples all forms can be measured in their time."""
    request.send(forms[0].module)
    begin = time.perf_counter()
    request.send(forms[0].module)
    each = (time.perf_counter() - begin) / request.num_examples * len(forms)
    return max(1, min(options.max_examples, int(options.quality_seconds / each)))


def _num_ops(form: Form, request: Request) -> int:
    return sum(count_ops(lambda: request.send(form.module)).values())


def _resident_bytes(form: Form, request: Request, found: Found) -> int | None:
    if form.resident_bytes is None:
        return None
    try:
        return form.resident_bytes(request)
    except Exception as error:  # noqa: BLE001  a session raises what it likes
        found.skip(f"memory of {form.name!r} was not measured", error)
        return None


def _peak_bytes(form: Form, trained: nn.Module, request: Request) -> int:
    """Most bytes alive while a batch of training's size is answered: weights, inputs, the rest."""
    inputs = request.tensors()
    alive = step_tensors(trained, inputs, None)
    peak = record_peak(lambda: request.send(form.module), alive, model_device(trained))
    # A quantized form holds its own weights in the place of the model's.
    return peak.peak_bytes - live_bytes(step_tensors(trained, (), None)) + form.size_bytes
