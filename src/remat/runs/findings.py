"""What the evidence of a run says, in sentences: seeds, calibration, slices, groups, targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remat.runs.evidence import Equivalence, Representation, SliceOrigin, SliceQuality
from remat.runs.reading import (
    best_planned,
    best_quality,
    final_quality,
    format_value,
    is_higher_better,
    metric_name,
    reference_of,
    write_difference,
)
from remat.runs.records import Run, Variant
from remat.units import format_seconds


def over_seeds(equivalences: Sequence[Equivalence]) -> str:
    """Say how trainings from several seeds compare, variant by variant where they differ."""
    compared = [one for one in equivalences if one.num_pairs > 1]
    if not compared:
        return ""
    seeds = max(one.num_pairs for one in compared)
    if all(one.num_identical == one.num_pairs for one in compared):
        return f"The same holds from each of {seeds} seeds."
    told = [
        f"{one.variant}: {one.num_identical} of {one.num_pairs} seeds identical"
        + ("" if one.num_identical == one.num_pairs else f", {write_difference(one)}")
        for one in compared
    ]
    return f"Over {seeds} seeds, {'; '.join(told)}."


def weakest_slice(variants: Sequence[Variant]) -> str:
    """Name the slice where the model is shown to be worse, planned and unplanned side by side."""
    subject = best_planned([v for v in variants if v.slices]) or reference_of(variants)
    found = None if subject is None else _weakest(subject.slices)
    if subject is None or found is None or found.quality is None or found.rest is None:
        return ""
    reference = reference_of(variants)
    same = [] if reference is None else [o for o in reference.slices if o.name == found.name]
    compared = ""
    if same and same[0].quality is not None and reference is not subject:
        is_same = same[0].quality.value == found.quality.value
        value = format_value(found.metric, same[0].quality.value)
        compared = ", with and without a plan" if is_same else f" ({value} without a plan)"
    return (
        f"The model is weakest where {_condition(found)}: {metric_name(found.metric)} "
        f"{format_value(found.metric, found.quality.value)} on {found.num_examples:,} examples, "
        f"{format_value(found.metric, found.rest)} on the others{compared}."
    )


def evidence_lines(run: Run) -> list[tuple[str, str]]:
    """Give heading and text of each kind of evidence that the run has."""
    found = [
        ("calibration", _calibration(run)),
        ("coverage", _coverage(run)),
        ("slices", _slices(run)),
        ("groups", _groups(run.representation)),
        ("best epoch", _best_epoch(run)),
        ("target", _targets(run)),
        ("not evaluated", _gaps(run)),
    ]
    return [(heading, text) for heading, text in found if text]


def _subject(run: Run) -> Variant | None:
    """The variant whose figures stand for the model: that without a plan, if it was trained."""
    reference = reference_of(run.variants)
    if reference is not None and reference.quality:
        return reference
    trained = [variant for variant in run.variants if variant.quality]
    return trained[0] if trained else None


def _calibration(run: Run) -> str:
    subject = _subject(run)
    if subject is None or subject.calibration is None:
        return ""
    found = subject.calibration
    line = f"confidence off by {found.before.expected_error:.1%} on average"
    if found.after is not None and found.temperature is not None:
        line += f", {found.after.expected_error:.1%} with temperature {found.temperature:.2f}"
    return f"{line} ({found.before.num_examples:,} predictions)"


def _coverage(run: Run) -> str:
    subject = _subject(run)
    if subject is None or not subject.coverage:
        return ""
    told = [f"{one.nominal:.0%} intervals hold {one.covered.value:.1%}" for one in subject.coverage]
    return ", ".join(told)


def _slices(run: Run) -> str:
    subject = _subject(run)
    if subject is None or not subject.slices:
        return ""
    worse = sum(one.is_worse for one in subject.slices)
    found_ones = sum(one.origin is SliceOrigin.FOUND for one in subject.slices)
    named = len(subject.slices) - found_ones
    counted = f"{named} named and {found_ones} found, {worse} shown to be worse than the rest"
    found = _weakest(subject.slices)
    if found is None or found.quality is None:
        return counted
    value = format_value(found.metric, found.quality.value)
    return f"{counted}; weakest where {_condition(found)}: {value}"


def _groups(rows: Sequence[Representation]) -> str:
    if not rows:
        return ""
    missing = [f"{row.feature} = {row.group}" for row in rows if row.is_missing]
    off = sum(row.is_off for row in rows)
    line = f"{len(rows)} compared with their reference, {off} off, {len(missing)} missing"
    return f"{line}: {', '.join(missing[:3])}" if missing else line


def _best_epoch(run: Run) -> str:
    subject = _subject(run)
    if subject is None or len(subject.quality) < 2:
        return ""
    best, last = best_quality(subject), final_quality(subject)
    if best is None or last is None:
        return ""
    value = format_value(last[0], best.metrics[last[0]])
    return f"{best.epoch + 1} of {len(subject.quality)}, with {metric_name(last[0])} {value}"


def _gaps(run: Run) -> str:
    """Name each section with its first reason; a reason that is that of many is told once."""
    reasons: dict[str, list[str]] = {}
    for gap in run.gaps:
        sections = reasons.setdefault(gap.reason, [])
        if gap.section not in sections:
            sections.append(gap.section)
    return "; ".join(f"{', '.join(found)}: {reason}" for reason, found in reasons.items())


def _targets(run: Run) -> str:
    if not run.targets:
        return ""
    reached = [
        f"{variant.label} {format_seconds(variant.seconds_to_target)}"
        + ("" if variant.steps_to_target is None else f" ({variant.steps_to_target} steps)")
        for variant in run.variants
        if variant.seconds_to_target is not None
    ]
    return f"{targets_told(run.targets)}: {', '.join(reached) or 'not reached'}"


def targets_told(targets: Mapping[str, float]) -> str:
    """Write targets for people, such as `accuracy >= 0.9`."""
    return ", ".join(
        f"{metric_name(name)} {'>=' if is_higher_better(name) else '<='} {value:.4g}"
        for name, value in targets.items()
    )


def _weakest(slices: Sequence[SliceQuality]) -> SliceQuality | None:
    """Of the slices that are shown to be worse, the one whose figure is worst."""
    worse = [one for one in slices if one.is_worse and one.quality is not None]
    if not worse:
        return None
    sign = 1 if is_higher_better(worse[0].metric) else -1
    return min(worse, key=lambda one: sign * one.quality.value if one.quality else 0.0)


def _condition(found: SliceQuality) -> str:
    return found.name if found.origin is SliceOrigin.FOUND else f"examples are {found.name!r}"
