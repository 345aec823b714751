"""The evidence on serving: forms of the model, latencies, and one training step beside it."""

from __future__ import annotations

from remat.report.forms import quality_by_slice
from remat.report.tables import (
    NOTHING,
    Section,
    Table,
    fixed,
    metric,
    number,
    rate,
    seconds,
    shown_metrics,
    table,
)
from remat.runs.evidence import Interval, ServedForm, Serving
from remat.runs.reading import metric_name
from remat.runs.records import Run
from remat.units import format_bytes

_FORM_METRICS = 2  # beside all else that is told of a form


def serving_section(run: Run) -> Section:
    """Tell how the model serves; without a table where it was not served."""
    serving = run.serving
    lead = "The trained model answering requests: how long, how many, how large."
    how = "Warm, over repeated requests; percentiles of the whole request, one batch at a time. "
    how += (
        "Memory is what torch's allocator hands out while a batch of training's size is answered, "
    )
    how += "or, marked resident, the growth of a process that opens an exported form and answers, "
    how += (
        "which counts whole pages and what the runtime keeps for itself: compare like with like. "
    )
    how += "Ratios are of requests in turn, with the 95% interval of the sign test."
    if serving is None:
        return Section(key="serving", title="Serving", lead=lead)
    updates = table(
        "One training step beside serving",
        ("Variant", "Step", "Requests meanwhile, p50", "p99", "Steps per minute",
         "Weights serve after"),
        (
            (
                u.variant,
                seconds(u.step_seconds),
                seconds(u.requests_p50_seconds),
                seconds(u.requests_p99_seconds),
                number(u.steps_per_minute, 3),
                seconds(u.lag_seconds),
            )
            for u in serving.updates
        ),
    )  # fmt: skip
    lines = [serving.recommendation] if serving.recommendation else []
    return Section(
        key="serving",
        title=f"Serving {serving.variant}",
        lead=lead,
        how=how,
        tables=(*_forms(serving), *quality_by_slice(serving), *_latencies(serving), *updates),
        remarks=tuple(lines),
    )


def _memory(form: ServedForm) -> str:
    if form.peak_bytes is not None:
        return format_bytes(form.peak_bytes)
    if form.resident_bytes is not None:
        return f"{format_bytes(form.resident_bytes)}, resident"
    return NOTHING


def _forms(serving: Serving) -> tuple[Table, ...]:
    names = shown_metrics(name for form in serving.forms for name in form.metrics)[:_FORM_METRICS]
    return table(
        "Forms of the model",
        ("Form", "Ops", "Size", "First request", "Memory", "Latency against as trained",
         *(metric_name(n) for n in names), "Largest difference", "To know"),
        (
            (
                f.name,
                NOTHING if f.num_ops is None else f"{f.num_ops:,}",
                NOTHING if f.size_bytes is None else format_bytes(f.size_bytes),
                seconds(f.first_request_seconds),
                _memory(f),
                _times(f.relative_latency),
                *(metric(name, f.metrics.get(name)) for name in names),
                number(f.largest_difference, 2),
                f.message if f.is_available else f"not available: {f.message}",
            )
            for f in serving.forms
        ),
        words=(0, 7 + len(names)),
    )  # fmt: skip


def _times(found: Interval | None) -> str:
    if found is None:
        return NOTHING
    low, high = fixed(found.low, 2), fixed(found.high, 2)
    return f"\N{MULTIPLICATION SIGN} {fixed(found.value, 2)} [{low}, {high}]"


def _latencies(serving: Serving) -> tuple[Table, ...]:
    return table(
        "Latency by batch size",
        ("Form", "Batch", "Requests", "p50", "p95", "p99", "Examples per second"),
        (
            (
                one.form,
                str(one.batch_size),
                f"{one.num_requests:,}",
                seconds(one.p50_seconds),
                seconds(one.p95_seconds),
                seconds(one.p99_seconds),
                rate(one.examples_per_second),
            )
            for one in serving.latencies
        ),
    )
