"""Latency of every form at every batch size, in turn, within the time that it may take."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from torch import nn

from remat.evaluation.serving.forms import TRAINED, Form
from remat.evaluation.serving.found import Found
from remat.evaluation.serving.latency import (
    latency_of,
    paired_ratio,
    request_in_turn,
)
from remat.evaluation.serving.options import ServingOptions
from remat.evaluation.serving.request import Request
from remat.units import format_seconds

# Seconds that one request of each form may take however short the measurement is to be.
_ALWAYS_S = 2.0


def time_forms(forms: list[Form], request: Request, options: ServingOptions, found: Found) -> None:
    """Time all forms in turn at each batch size, from the smallest on.

    A form that refuses a size is left out there. Sizes at which one request of each form would take
    longer than all of them may (and than two seconds), as the size before them tells, are left out,
    and said to be. Ratios to the model as trained are those of the smallest size, where what is
    paid once a call shows the most.
    """
    share = options.seconds / len(options.batch_sizes)
    smallest: dict[str, tuple[float, ...]] = {}
    per_example = 0.0
    for number in sorted(options.batch_sizes):
        expected = per_example * number
        if expected > max(options.seconds, _ALWAYS_S):
            what = f"batches of {number} were not timed"
            found.skip(what, f"one request of each form would take {format_seconds(expected)}")
            continue
        calls = _callable(forms, request.of(number), found)
        times = request_in_turn(calls, seconds=share) if calls else {}
        per_example = sum(statistics.median(seconds) for seconds in times.values()) / number
        smallest = smallest or times
        found.latencies += [latency_of(name, number, seconds) for name, seconds in times.items()]
    plain = smallest.get(TRAINED, ())
    ratios = {n: paired_ratio(s, plain) for n, s in smallest.items() if n != TRAINED and plain}
    found.forms = [
        form.model_copy(update={"relative_latency": ratios.get(form.name)}) for form in found.forms
    ]


def _callable(forms: list[Form], request: Request, found: Found) -> dict[str, Callable[[], object]]:
    """Let each form answer once; return those that do."""
    calls: dict[str, Callable[[], object]] = {}
    for form in forms:
        call = functools.partial(_answered, request, form.module)
        try:
            call()
        except Exception as error:  # noqa: BLE001  a form of a fixed size raises what it likes
            what = f"{form.name!r} does not answer batches of {request.num_examples}"
            found.skip(what, error)
        else:
            calls[form.name] = call
    return calls


def _answered(request: Request, module: nn.Module) -> None:
    """Wait for the answer, not only until it is on its way."""
    request.send(module)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
