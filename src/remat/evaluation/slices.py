"""Quality on parts of the evaluation data: named by the user, or found where the model is worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from remat.errors import WorkloadError
from remat.evaluation.predictions import Predictions
from remat.evaluation.statistics import Mask, holm
from remat.evaluation.tally import Tally, tally
from remat.runs.evidence import SliceOrigin, SliceQuality

SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSlice:
    """A slice that a search proposed, and the examples that the search did not see.

    Only those may judge it: on the examples where it was found it looks worse than it is.
    """

    name: str
    examples: Mask
    unseen: Mask


def slice_quality(
    predictions: Predictions,
    named: Mapping[str, Mask],
    found: Sequence[FoundSlice] = (),
    *,
    significance: float = SIGNIFICANCE,
) -> tuple[SliceQuality, ...]:
    """Measure the metric of the task on each slice against the rest, in the order given.

    Arguments
    ---------
    predictions: of one model over N examples.
    named: name -> mask (N,) of the examples of the slice.
    found: slices of a search, each measured on its unseen examples.

    The p-value is that of a one-sided test that the slice is worse: Fisher's exact test where
    examples are right or wrong, else Welch's t-test on the mean errors of the examples. All
    p-values are adjusted together (Holm 1979). An empty slice has no figure, and is not worse.

    Raises
    ------
    WorkloadError: for a mask whose length is not that of the predictions.
    """
    figures = tally(predictions)
    everything = np.ones(predictions.num_examples, dtype=bool)
    measured = [
        *(
            _measured(
                figures, name, SliceOrigin.NAMED, _checked(name, mask, everything), everything
            )
            for name, mask in named.items()
        ),
        *(
            _measured(figures, one.name, SliceOrigin.FOUND, one.examples, one.unseen)
            for one in found
        ),
    ]
    return _adjusted(measured, figures, significance)


def worst_slice(slices: Sequence[SliceQuality], *, higher_is_better: bool) -> SliceQuality | None:
    """Return the slice with the worst figure; `None` without any."""
    known = [one for one in slices if one.quality is not None]
    sign = 1 if higher_is_better else -1
    return min(known, key=lambda one: sign * one.quality.value if one.quality else 0, default=None)


def _checked(name: str, mask: Mask, everything: Mask) -> Mask:
    found = np.asarray(mask, dtype=bool)
    if found.shape != everything.shape:
        raise WorkloadError(
            f"slice {name!r} has a mask of shape {list(found.shape)}, but there are predictions "
            f"for {len(everything)} examples."
        )
    return found


def _measured(
    figures: Tally, name: str, origin: SliceOrigin, examples: Mask, among: Mask
) -> SliceQuality:
    has_rows = np.isfinite(figures.error)
    inside, outside = examples & among & has_rows, ~examples & among & has_rows
    return SliceQuality(
        name=name,
        origin=origin,
        metric=figures.metric,
        num_examples=int(inside.sum()),
        quality=figures.interval(inside),
        rest=figures.of(outside),
        p_value=_p_value(figures, inside, outside),
        is_worse=False,
    )


def _p_value(figures: Tally, inside: Mask, outside: Mask) -> float | None:
    """Test that the errors inside are larger; `None` where there are too few to test."""
    errors, others = figures.error[inside], figures.error[outside]
    if figures.is_share:
        if not (errors.size and others.size):
            return None
        from scipy.stats import fisher_exact

        wrong, wrong_outside = int(errors.sum()), int(others.sum())
        table = [
            [wrong, errors.size - wrong],
            [wrong_outside, others.size - wrong_outside],
        ]
        return float(fisher_exact(table, alternative="greater").pvalue)
    if errors.size < 2 or others.size < 2:
        return None
    spread = max(float(np.ptp(errors)), float(np.ptp(others)))
    if spread <= 1e-12 * max(float(np.abs(errors).max()), float(np.abs(others).max())):
        return None if errors[0] == others[0] else float(errors[0] < others[0])
    from scipy.stats import ttest_ind

    return float(ttest_ind(errors, others, equal_var=False, alternative="greater").pvalue)


def _adjusted(
    slices: Sequence[SliceQuality], figures: Tally, significance: float
) -> tuple[SliceQuality, ...]:
    tested = [one for one in slices if one.p_value is not None]
    adjusted = holm([one.p_value for one in tested if one.p_value is not None])
    by_name = {(one.origin, one.name): p for one, p in zip(tested, adjusted, strict=True)}
    return tuple(
        _judged(one, by_name.get((one.origin, one.name)), figures, significance) for one in slices
    )


def _judged(
    one: SliceQuality, adjusted: float | None, figures: Tally, significance: float
) -> SliceQuality:
    is_worse = False
    if adjusted is not None and one.quality is not None and one.rest is not None:
        behind = (
            one.rest - one.quality.value
            if figures.is_higher_better
            else one.quality.value - one.rest
        )
        is_worse = adjusted < significance and behind > 0
    return one.model_copy(update={"adjusted_p_value": adjusted, "is_worse": is_worse})
