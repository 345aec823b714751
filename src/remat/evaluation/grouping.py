"""Columns of any kind as few named groups: categories as they are, numbers by their quantiles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remat.evaluation.predictions import Integers

# More distinct values than this are cut into bins (numbers) or counted together (text).
MOST_GROUPS = 12
_MOST_FRACTIONS = 4  # of numbers that are not all whole: a measured share is no category
_BINS = 4
MISSING, OTHER = "missing", "any other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """How a feature is cut into groups: either `edges` between bins of numbers, or `values`."""

    feature: str
    edges: tuple[float, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of every group, in the order of the codes; the last one is for what is missing."""
        if not self.edges:
            return (*self.values, OTHER, MISSING)
        written = [f"{edge:.4g}" for edge in self.edges]
        inner = [f"{low} to {high}" for low, high in itertools.pairwise(written)]
        return (f"below {written[0]}", *inner, f"{written[-1]} and above", MISSING)

    def describe(self, code: int) -> str:
        """Write one group with its feature, such as `brightness below 0.2` or `digit = 8`."""
        label = self.labels[code]
        if self.edges and label != MISSING:
            return f"{self.feature} {label}"
        return (
            f"{self.feature} {label}" if label in (OTHER, MISSING) else f"{self.feature} = {label}"
        )

    def codes(self, column: NDArray[np.generic]) -> Integers:
        """Give the group of every value, as a number from 0; NaN, None and NaT are missing."""
        is_missing = missing(column)
        if self.edges:
            numbers = np.where(is_missing, 0.0, column).astype(np.float64)
            found = np.searchsorted(np.asarray(self.edges), numbers, side="right")
        else:
            place = {value: i for i, value in enumerate(self.values)}
            found = np.array([place.get(text, len(place)) for text in _as_text(column)], dtype=int)
        return np.where(is_missing, len(self.labels) - 1, found).astype(np.int64)


def group(feature: str, column: NDArray[np.generic]) -> Grouping:
    """Choose the groups of a feature from the values that it takes here.

    Up to 12 distinct values are groups of their own, of numbers that are not all whole up to 4.
    More numbers are cut at their quartiles, or above their least value where three quarters have
    it; more texts leave the rarest to one group of all others.
    """
    present = column[~missing(column)]
    distinct, counts = np.unique(_as_text(present), return_counts=True)
    if is_numeric(column):
        numbers = present.astype(np.float64)
        is_whole = bool((numbers == np.floor(numbers)).all())
        if len(distinct) > (MOST_GROUPS if is_whole else _MOST_FRACTIONS):
            cuts = np.unique(np.quantile(numbers, np.arange(1, _BINS) / _BINS))
            cuts = cuts[cuts > numbers.min()]
            if not cuts.size:
                cuts = numbers[numbers > numbers.min()].min(keepdims=True)
            return Grouping(feature=feature, edges=tuple(float(cut) for cut in cuts))
    kept = np.sort(np.argsort(-counts, kind="stable")[:MOST_GROUPS])
    values = [str(text) for text in distinct[kept]]
    if is_numeric(column):
        values.sort(key=float)
    return Grouping(feature=feature, values=tuple(values))


def is_numeric(column: NDArray[np.generic]) -> bool:
    """Say whether a column holds numbers (truth values are two groups, and no numbers)."""
    return bool(np.issubdtype(column.dtype, np.number))


def missing(column: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Mark the values that are not there."""
    if np.issubdtype(column.dtype, np.inexact):
        return np.isnan(column)  # type: ignore[no-any-return]
    if column.dtype == object:
        return np.array([one is None or one != one for one in column], dtype=bool)
    return np.zeros(len(column), dtype=bool)


def _as_text(column: NDArray[np.generic]) -> list[str]:
    """Write each value as a reader would: 3 and not 3.0, no type around it."""
    if np.issubdtype(column.dtype, np.inexact):
        return [f"{float(value):.6g}" for value in column]
    return [str(value) for value in column.tolist()]
