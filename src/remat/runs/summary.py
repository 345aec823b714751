"""One paragraph about a run, for a reader who knows no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from remat.runs.evidence import Equivalence
from remat.runs.findings import over_seeds, weakest_slice
from remat.runs.reading import (
    MINUS,
    best_planned,
    final_quality,
    format_value,
    is_time_difference_clear,
    metric_name,
    reference_of,
    relative_time,
)
from remat.runs.records import Variant, VariantKind, VariantStatus, Verdict
from remat.units import format_bytes, format_seconds


def summarize(
    name: str,
    variants: Sequence[Variant],
    *,
    is_complete: bool,
    equivalences: Sequence[Equivalence] = (),
) -> str:
    """Write the paragraph: memory, time, whether the result changed, and what could not be done."""
    reference = reference_of(variants)
    best = best_planned(variants)
    sentences = [] if is_complete else [_unfinished(variants)]
    if reference is not None and reference.measured_peak_bytes and best is not None:
        sentences.append(_headline(name, reference, best))
        sentences.append(_sameness(variants))
        sentences.append(over_seeds(equivalences))
        sentences.append(weakest_slice(variants))
        sentences.extend(_against_policy(reference, variants))
    elif best is not None:
        sentences.append(
            f"{name} trains within {format_bytes(best.measured_peak_bytes or 0)}; without a plan "
            "it could not be run here, so there is nothing to compare with."
        )
    else:
        sentences.append(f"No plan for {name} has been measured.")
    sentences.extend(_infeasible(variants))
    return " ".join(sentence for sentence in sentences if sentence)


def _headline(name: str, reference: Variant, best: Variant) -> str:
    before, after = reference.measured_peak_bytes or 0, best.measured_peak_bytes or 0
    change = after / before - 1
    if round(abs(change), 2) == 0:
        need = f"as much memory as before ({format_bytes(after)})"
    else:
        word = "less" if change < 0 else "more"
        need = (
            f"{abs(change):.0%} {word} memory ({format_bytes(after)} instead of "
            f"{format_bytes(before)})"
        )
    return f"Under a plan by remat, training {name} needs {need}, {_time_cost(best, reference)}."


def _time_cost(variant: Variant, reference: Variant) -> str:
    ratio = relative_time(variant, reference)
    if ratio is None or variant.step_times is None:
        return "with its step time not measured yet"
    if not is_time_difference_clear(variant, reference):
        return f"with a step time that measurement noise hides ({ratio:+.0%})".replace("-", MINUS)
    word = "longer" if ratio > 0 else "shorter"
    median = format_seconds(variant.step_times.median_seconds)
    return f"with training steps {abs(ratio):.0%} {word} ({median} each)"


def _sameness(variants: Sequence[Variant]) -> str:
    trained = [
        variant
        for variant in variants
        if variant.kind is not VariantKind.REFERENCE and variant.losses_identical is not None
    ]
    failed = [variant for variant in variants if variant.verdict is Verdict.FAILED]
    if failed:
        named = "; ".join(f"{variant.label}: {variant.message}" for variant in failed)
        return f"Checks FAILED. {named}."
    if not trained:
        return "Whether training gives the same result has not been checked to the end."
    reference = reference_of(variants)
    quality = final_quality(reference) if reference is not None else None
    ending = ""
    if quality is not None:
        name, value = quality
        ending = f", and validation {metric_name(name)} is {format_value(name, value)} in every run"
    if all(variant.losses_identical and variant.weights_identical for variant in trained):
        steps = len(trained[0].losses)
        return (
            f"The result of training is unchanged: the losses of all {steps:,} steps and the final "
            f"weights equal those of training without a plan, bit for bit{ending}."
        )
    differing = [v for v in trained if not (v.losses_identical and v.weights_identical)]
    told = "; ".join(f"{variant.label}: {variant.message}" for variant in differing)
    return f"Training under a plan differs in its bits. {told[0].upper()}{told[1:]}."


def _against_policy(reference: Variant, variants: Sequence[Variant]) -> list[str]:
    """Compare with recomputing every block, what people do where they have no planner."""
    usual = [
        variant
        for variant in variants
        if variant.kind is VariantKind.POLICY and variant.losses and variant.step_times is not None
    ]
    if not usual:
        return []
    policy = usual[0]
    if policy.measured_peak_bytes is None:
        return []
    peak = format_bytes(policy.measured_peak_bytes)
    cost = _time_cost(policy, reference)
    return [f"For comparison, recomputing {policy.label} peaks at {peak}, {cost}."]


def _infeasible(variants: Sequence[Variant]) -> list[str]:
    return [
        f"The budget {variant.asked_budget} cannot be reached: the least peak found is "
        f"{format_bytes(variant.minimum_bytes or 0)}."
        for variant in variants
        if variant.status is VariantStatus.INFEASIBLE
    ]


def _unfinished(variants: Sequence[Variant]) -> str:
    done = sum(variant.status is VariantStatus.FINISHED for variant in variants)
    return f"This run was not finished ({done} of {len(variants)} variants were)."
