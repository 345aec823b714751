"""The verdict on each variant of a run, drawn from its measurements alone."""

from __future__ import annotations

from collections.abc import Sequence

from remat.runs.evidence import Equivalence
from remat.runs.reading import metric_name, write_difference
from remat.runs.records import Run, RunStatus, Variant, VariantKind, VariantStatus, Verdict
from remat.runs.summary import summarize
from remat.units import format_bytes

_RAN = (VariantStatus.MEASURED, VariantStatus.FINISHED)


def judged(run: Run) -> Run:
    """Return the run with verdicts, outcome and summary drawn from its variants."""
    equivalences = {one.variant: one for one in run.equivalences}
    variants = tuple(judge(variant, equivalences.get(variant.label)) for variant in run.variants)
    is_complete = run.status is RunStatus.COMPLETE
    return run.model_copy(
        update={
            "variants": variants,
            "passed": is_complete and has_passed(variants),
            "summary": summarize(
                run.name, variants, is_complete=is_complete, equivalences=run.equivalences
            ),
        }
    )


def judge(variant: Variant, equivalence: Equivalence | None = None) -> Variant:
    """Give the variant its verdict, with every reason for a failure in `message`.

    A planned variant passes where it stayed within its budget, its gradients and random state were
    those of the model without a plan, and training ended with the same losses and weights. Only
    where the model itself is not reproducible (`within_noise`), or where the plan sums in another
    order (`within_rounding`), may losses and weights differ. Such a variant passes where it was
    shown to be equivalent over several seeds, fails where the mean difference is beyond the
    margin, and has no verdict where the seeds are too few to say.
    """
    if variant.kind is VariantKind.REFERENCE:
        return variant.model_copy(update={"verdict": Verdict.REFERENCE})
    if variant.status is VariantStatus.FAILED:
        return variant.model_copy(update={"verdict": Verdict.FAILED})
    if variant.status not in _RAN:
        return variant.model_copy(update={"verdict": Verdict.NONE})
    problems = _problems(variant)
    if problems:
        message = "; ".join(problems)
        return variant.model_copy(update={"verdict": Verdict.FAILED, "message": message})
    verdict, message = Verdict.PASSED, _praise(variant)
    if _differs(variant):
        verdict, message = _by_equivalence(equivalence)
    return variant.model_copy(update={"verdict": verdict, "message": message})


def has_passed(variants: Sequence[Variant]) -> bool:
    """Say whether no check failed and at least one variant passed its checks."""
    verdicts = [variant.verdict for variant in variants]
    return Verdict.FAILED not in verdicts and Verdict.PASSED in verdicts


def _problems(variant: Variant) -> list[str]:
    found = []
    verification, budget, peak = (
        variant.verification,
        variant.budget_bytes,
        variant.measured_peak_bytes,
    )
    if verification is not None and not verification.passed:
        named = ", ".join(difference.name for difference in verification.differences[:3])
        found.append(
            f"a step under the plan differs from one without it ({named})"
            if named
            else "; ".join(verification.notes) or "verification did not pass"
        )
    if budget is not None and peak is not None and peak > budget:
        found.append(
            f"the measured peak of {format_bytes(peak)} is above the budget of "
            f"{format_bytes(budget)} by {format_bytes(peak - budget)}"
        )
    may_differ = verification is not None and verification.passed and not verification.identical
    if not may_differ:
        if variant.losses_identical is False:
            found.append("its loss curve differs from that without a plan")
        if variant.weights_identical is False:
            found.append("its final weights differ from those without a plan")
    return found


def _differs(variant: Variant) -> bool:
    """Say whether the variant was trained to another end than the one without a plan."""
    return variant.status is VariantStatus.FINISHED and (
        variant.losses_identical is False or variant.weights_identical is False
    )


def _by_equivalence(found: Equivalence | None) -> tuple[Verdict, str]:
    if found is None or found.num_pairs < 2:
        return Verdict.NONE, (
            "its steps are right but for noise or rounding, but training ended elsewhere, and one "
            "seed is too few to say whether it is as good: evaluate with 3 seeds or more"
        )
    if found.difference is None:
        return Verdict.NONE, f"its {metric_name(found.metric)} is not a number in every seed"
    written = write_difference(found)
    if found.is_equivalent:
        return Verdict.PASSED, f"equivalent to training without a plan: {written}"
    if abs(found.difference.value) > found.margin:
        return Verdict.FAILED, f"not as training without a plan: {written}"
    return Verdict.NONE, f"too few seeds to say whether it is equivalent: {written}"


def _praise(variant: Variant) -> str:
    if variant.verification is not None and variant.verification.within_rounding:
        return "equal but for the order of summation, as planned"
    if variant.verification is not None and not variant.verification.identical:
        return "within the run-to-run noise of the model itself"
    if variant.weights_identical and variant.losses_identical:
        return "gradients, losses and final weights identical bit for bit"
    if variant.verification is not None:
        return "gradients identical bit for bit"
    return "within its budget"
