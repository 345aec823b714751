"""Which form and batch size to serve with: the most examples per second within a latency."""

from __future__ import annotations

from collections.abc import Sequence

from remat.evaluation.serving.forms import ATTACHED, DETACHED, TRAINED
from remat.runs.evidence import Latency, ServedForm
from remat.runs.reading import is_higher_better
from remat.units import format_seconds

# A form whose validation loss is worse by more than this share is not recommended.
LOSS_MARGIN = 0.02
# Without a target: the smallest batch whose throughput is at least this share of the highest.
_ENOUGH = 0.95


def recommend(
    forms: Sequence[ServedForm], latencies: Sequence[Latency], target_p95_seconds: float | None
) -> tuple[Latency | None, str]:
    """Pick a form and batch size, and say why; `None` where no form is within the target.

    Forms whose validation loss is more than 2% above that of the model as trained are left out,
    and those of which it is not known: where a form has no loss, the first metric that both have
    decides. So is the model with its plan on or taken off, which is the same model.
    """
    good = {form.name for form in forms if form.is_available and _is_as_good(form, forms)}
    found = [row for row in latencies if row.form in good - {ATTACHED, DETACHED}]
    if not found:
        return None, "Nothing was timed, so no batch size is recommended."
    if target_p95_seconds is None:
        most = max(row.examples_per_second for row in found)
        enough = [row for row in found if row.examples_per_second >= _ENOUGH * most]
        best = min(enough, key=lambda row: (row.p95_seconds, -row.examples_per_second))
        return best, f"{_said(best)}; the highest of all is {most:,.0f}. No latency was asked for."
    asked = f"95 of 100 answers within {format_seconds(target_p95_seconds)}"
    within = [row for row in found if row.p95_seconds <= target_p95_seconds]
    if not within:
        fastest = min(found, key=lambda row: row.p95_seconds)
        return None, f"No form gives {asked}; the fastest was {_said(fastest)}."
    best = max(within, key=lambda row: (row.examples_per_second, -row.batch_size))
    return best, f"{_said(best)}, the most that gives {asked}."


def _is_as_good(form: ServedForm, forms: Sequence[ServedForm]) -> bool:
    if form.name == TRAINED:
        return True
    trained = next((other.metrics for other in forms if other.name == TRAINED), {})
    shared = [
        name for name in ("loss", "nll", *trained) if name in trained and name in form.metrics
    ]
    if not shared:
        return False
    name = shared[0]
    base, value = trained[name], form.metrics[name]
    worse = base - value if is_higher_better(name) else value - base
    return worse <= LOSS_MARGIN * abs(base)  # False for NaN


def _said(row: Latency) -> str:
    return (
        f"{row.form!r} with batches of {row.batch_size}: {row.examples_per_second:,.0f} examples "
        f"per second, p95 {format_seconds(row.p95_seconds)} over {row.num_requests} requests"
    )
