"""Slices where the model is worse, found over the features of the evaluation data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from remat.errors import MissingPackageError
from remat.evaluation.grouping import group
from remat.evaluation.predictions import Predictions
from remat.evaluation.slices import FoundSlice
from remat.evaluation.statistics import Floats, Mask, halves
from remat.evaluation.tally import tally

# A slice of fewer examples could not be told from chance on the other half.
LEAST_SUPPORT = 10
# Standard errors between two means, one-sided, at 5%.
_CLEARLY = 1.64
# Least share of the examples: smaller slices matter less than they cost in corrected p-values.
_LEAST_SHARE = 0.02
_MOST_SLICES = 5
# Weight of the slice's error against its size in SliceLine's score; 0.95 is the paper's choice.
_ALPHA = 0.95


def require_finder() -> None:
    """Fail now, not after training, where the package that finds slices is missing.

    Raises
    ------
    MissingPackageError: with the install command.
    """
    try:
        import sliceline  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("sliceline", "eval", "Finding slices over features") from error


def find_slices(
    predictions: Predictions,
    features: Mapping[str, NDArray[np.generic]],
    *,
    most: int = _MOST_SLICES,
    seed: int = 0,
) -> tuple[FoundSlice, ...]:
    """Propose slices of one or two predicates where the errors are largest, best first.

    SliceLine (Sagadeeva and Boehm 2021) searches all of them, exactly, on a random half of the
    examples; the other half is left to judge them by. Numbers are cut at their quartiles. Slices
    that are bad only because of better ones in them, or the reverse, are left out.

    Arguments
    ---------
    features: name -> column (N,) of numbers, truth values or text, over the examples.
    """
    errors = tally(predictions).error
    searched, unseen = halves(predictions.num_examples, seed)
    searched &= np.isfinite(errors)
    groupings = [group(name, column) for name, column in features.items()]

    support = max(LEAST_SUPPORT, round(_LEAST_SHARE * int(searched.sum())))
    if not groupings or int(searched.sum()) < 2 * support or not (errors[searched] > 0).any():
        return ()
    rows = np.stack([one.codes(features[one.feature]) for one in groupings], axis=1)
    tops = _search(rows[searched], errors[searched], support, 4 * most)
    proposed: list[FoundSlice] = []
    for top in tops:
        predicates = _without_idle(top, rows, searched, errors)
        examples = _inside(predicates, rows)
        can_be_judged = (examples & unseen).sum() >= LEAST_SUPPORT // 2
        if (
            len(proposed) < most
            and can_be_judged
            and _is_news(examples, searched, errors, proposed, support)
        ):
            name = " and ".join(groupings[place].describe(code) for place, code in predicates)
            proposed.append(FoundSlice(name=name, examples=examples, unseen=unseen))
    return tuple(proposed)


def _inside(predicates: list[tuple[int, int]], rows: NDArray[np.int64]) -> Mask:
    inside = np.ones(len(rows), dtype=bool)
    for place, code in predicates:
        inside &= rows[:, place] == code
    return inside


def _without_idle(
    predicates: list[tuple[int, int]], rows: NDArray[np.int64], searched: Mask, errors: Floats
) -> list[tuple[int, int]]:
    """Drop a predicate that does not matter: what it shuts out has errors like what it leaves."""
    for idle in predicates if len(predicates) > 1 else ():
        wider = [one for one in predicates if one != idle]
        inside = _inside(predicates, rows) & searched
        shut_out = _inside(wider, rows) & searched & ~inside
        if not _is_clearly_larger(errors[inside], errors[shut_out]):
            return wider
    return predicates


def _is_clearly_larger(errors: Floats, others: Floats) -> bool:
    """Say whether the mean is larger beyond noise (5%); it screens, and judges nothing."""
    if errors.size < 2 or others.size < 2:
        return False
    behind = float(errors.mean() - others.mean())
    spread = float(errors.var(ddof=1) / errors.size + others.var(ddof=1) / others.size)
    return behind > 0 and behind * behind > _CLEARLY**2 * spread


def _is_news(
    examples: Mask, searched: Mask, errors: Floats, proposed: list[FoundSlice], support: int
) -> bool:
    """Say whether the slice is still a bad one without the slices that were proposed before.

    Where one combination is bad, each of its halves looks bad too, and so does every part of it.
    """
    left = searched.copy()
    for other in proposed:
        left &= ~other.examples
    inside, outside = examples & left, ~examples & left
    return bool(inside.sum() >= support) and _is_clearly_larger(errors[inside], errors[outside])


def _search(
    rows: NDArray[np.int64], errors: Floats, support: int, most: int
) -> list[list[tuple[int, int]]]:
    """Give the slices with the best scores, each as (column, code) of its predicates."""
    require_finder()
    from sliceline import Slicefinder

    finder = Slicefinder(alpha=_ALPHA, k=most, max_l=2, min_sup=support, verbose=False)
    finder.fit(rows, errors)
    return [
        [(place, int(code)) for place, code in enumerate(top) if code is not None]
        for top in finder.top_slices_
    ]
