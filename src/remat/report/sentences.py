"""What a manager reads: five sentences about a run, drawn from its figures alone."""

from __future__ import annotations

from dataclasses import dataclass

from remat.report.expense import cheaper_device, dearer
from remat.report.watch import findings
from remat.runs.reading import (
    MINUS,
    final_quality,
    format_value,
    is_time_difference_clear,
    metric_name,
    reference_of,
    relative_time,
)
from remat.runs.records import Run, RunStatus, Variant, VariantKind, VariantStatus, Verdict
from remat.units import format_bytes, format_seconds

_MOST_WATCHED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One answer; `is_good` is None where it is neither good nor bad news."""

    key: str
    question: str
    text: str
    is_good: bool | None = None


def five_sentences(run: Run) -> tuple[Sentence, ...]:
    """Say what it saves, what it costs, whether the model is right, what to watch, what to do.

    A pure function of the run: no word without a figure of the run behind it, and where a figure
    is missing the sentence says so.
    """
    best = smallest_passed(run)
    return (_saves(run, best), _costs(run, best), _right(run), _watch(run), _do(run, best))


def smallest_passed(run: Run) -> Variant | None:
    """Return the plan with the least measured memory of those that passed their checks."""
    found = [v for v in _plans(run) if v.verdict is Verdict.PASSED and v.measured_peak_bytes]
    return min(found, key=lambda v: v.measured_peak_bytes or 0, default=None)


def _plans(run: Run) -> list[Variant]:
    return [v for v in run.variants if v.kind is VariantKind.PLANNED]


def _saves(run: Run, best: Variant | None) -> Sentence:
    key, question = "saves", "What it saves"
    reference = reference_of(run.variants)
    if best is None or not best.measured_peak_bytes:
        why = "no plan passed its checks" if _failed(run) else "no plan was measured to the end"
        return Sentence(key=key, question=question, text=f"Nothing yet: {why}.", is_good=False)
    after = best.measured_peak_bytes
    if reference is None or not reference.measured_peak_bytes:
        text = (
            f"Training {run.name} runs within {format_bytes(after)}; without a plan it did not run "
            "on this machine at all."
        )
        return Sentence(key=key, question=question, text=text, is_good=True)
    before = reference.measured_peak_bytes
    share = 1 - after / before
    if round(abs(share), 2) == 0:
        text = f"Training {run.name} needs the same memory as before, {format_bytes(after)}."
        return Sentence(key=key, question=question, text=text)
    word = "less" if share > 0 else "more"
    text = (
        f"Training {run.name} needs {abs(share):.0%} {word} memory: {format_bytes(after)} instead "
        f"of {format_bytes(before)}."
    )
    return Sentence(key=key, question=question, text=text, is_good=share > 0)


def _costs(run: Run, best: Variant | None) -> Sentence:
    key, question = "costs", "What it costs"
    reference = reference_of(run.variants)
    if best is None:
        text = "Unknown: there is no plan with a passed check whose time could be given."
        return Sentence(key=key, question=question, text=text)
    ratio = relative_time(best, reference)
    if ratio is None or best.step_times is None or reference is None or not reference.step_times:
        text = "Unknown: the time of a training step was not measured both with and without it."
        return Sentence(key=key, question=question, text=text)
    now = format_seconds(best.step_times.median_seconds)
    then = format_seconds(reference.step_times.median_seconds)
    if not is_time_difference_clear(best, reference):
        change = f"{ratio:+.0%}".replace("-", MINUS)
        text = f"No time that can be told from chance: steps took {now} and {then} ({change})."
        return Sentence(key=key, question=question, text=text)
    word = "longer" if ratio > 0 else "less time"
    text = f"Each training step takes {abs(ratio):.0%} {word}: {now} instead of {then}"
    text += dearer(run, best.label)
    return Sentence(key=key, question=question, text=f"{text}.")


def _right(run: Run) -> Sentence:
    key, question = "right", "Is the model still right?"
    failed = _failed(run)
    if failed:
        first = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        text = f"No: {first.label}{more} failed its checks, as {first.message.rstrip('.')}."
        return Sentence(key=key, question=question, text=text, is_good=False)
    checked = [
        v
        for v in run.variants
        if v.kind is not VariantKind.REFERENCE and v.losses_identical is not None
    ]
    if not checked:
        text = "Not known yet: no training under a plan was compared with one without to its end."
        return Sentence(key=key, question=question, text=text)
    apart = [e for e in run.equivalences if not e.is_equivalent and e.num_identical < e.num_pairs]
    if apart:
        text = (
            f"Not shown: over {apart[0].num_pairs} trainings, {metric_name(apart[0].metric)} "
            f"under {apart[0].variant} may differ by more than the margin of {apart[0].margin:.3g}."
        )
        return Sentence(key=key, question=question, text=text, is_good=False)
    if _all_identical(run, checked):
        trainings = sum(1 + len(v.repeats) for v in checked)
        text = (
            "Yes: it ends as exactly the same model, equal in every digit, in "
            f"{_counted(trainings, 'training')} under a plan or a fixed rule{_quality(run)}."
        )
        return Sentence(key=key, question=question, text=text, is_good=True)
    if run.equivalences:
        least = min(run.equivalences, key=lambda e: e.num_pairs)
        text = (
            f"Yes, as good within the stated margin: over {least.num_pairs} trainings each, no "
            f"figure of quality differs by more than allowed{_quality(run)}."
        )
    else:
        text = f"Yes: it differs no more than two trainings without a plan do{_quality(run)}."
    return Sentence(key=key, question=question, text=text, is_good=True)


def _all_identical(run: Run, checked: list[Variant]) -> bool:
    return all(
        v.losses_identical
        and v.weights_identical
        and all(r.losses_identical and r.weights_identical for r in v.repeats)
        for v in checked
    ) and all(e.num_identical == e.num_pairs for e in run.equivalences)


def _quality(run: Run) -> str:
    reference = reference_of(run.variants)
    found = final_quality(reference) if reference is not None else None
    if found is None:
        return ""
    return f"; {metric_name(found[0])} is {format_value(*found)}"


def _watch(run: Run) -> Sentence:
    key, question = "watch", "What to watch"
    found = findings(run)
    if not found:
        text = (
            "Nothing stands out; the figures hold for this model, batch size and machine, so "
            "measure again when one of them changes."
        )
        return Sentence(key=key, question=question, text=text)
    shown = [finding.text for finding in found[:_MOST_WATCHED]]
    left = len(found) - len(shown)
    text = "; ".join(shown)
    if left:
        text += f"; and {_counted(left, 'more point')} under Evidence"
    is_good = False if any(finding.is_bad for finding in found) else None
    return Sentence(
        key=key, question=question, text=f"{text[0].upper()}{text[1:]}.", is_good=is_good
    )


def _do(run: Run, best: Variant | None) -> Sentence:
    key, question = "do", "What to do"
    if _failed(run):
        text = (
            "Do not train with a plan that failed; read its reason under Evidence, and evaluate "
            "again before anything is decided."
        )
        return Sentence(key=key, question=question, text=text, is_good=False)
    if run.status is RunStatus.UNFINISHED:
        text = "Let the evaluation run to its end before anything is decided."
        return Sentence(key=key, question=question, text=text)
    if best is None:
        return Sentence(key=key, question=question, text=_without_plan(run))
    return Sentence(key=key, question=question, text=_choice(run, best), is_good=True)


def _without_plan(run: Run) -> str:
    least = [v.minimum_bytes for v in _plans(run) if v.minimum_bytes is not None]
    if least:
        return (
            f"Ask for at least {format_bytes(min(least))}, or make the batch smaller: no plan that "
            "was found needs less."
        )
    return "Name a memory budget and evaluate again, as no plan was tried."


def _choice(run: Run, best: Variant) -> str:
    """Name the plan to take; and that none is needed where memory is not short."""
    reference = reference_of(run.variants)
    cheaper = cheaper_device(run)
    if cheaper is not None:
        return cheaper
    after = format_bytes(best.measured_peak_bytes or 0)
    if reference is None or not reference.measured_peak_bytes:
        return f"Train under {best.label}, wherever {after} are free."
    before = reference.measured_peak_bytes
    if (best.measured_peak_bytes or 0) >= before:
        return "Train without a plan: the one that was asked for saves nothing here."
    ratio = relative_time(best, reference)
    if ratio is not None and ratio <= 0 and is_time_difference_clear(best, reference):
        return f"Train under {best.label}: it is both smaller and faster."
    return (
        f"Train under {best.label} where memory is short or a larger batch is wanted; where "
        f"{format_bytes(before)} are free and enough, no plan is needed."
    )


def _failed(run: Run) -> list[Variant]:
    return [
        v for v in run.variants if v.verdict is Verdict.FAILED or v.status is VariantStatus.FAILED
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
