"""Whom the evaluation data stand for: their groups against a population or the training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from remat.errors import WorkloadError
from remat.evaluation.grouping import MISSING, OTHER, Grouping, group
from remat.evaluation.metadata import Column
from remat.evaluation.slices import SIGNIFICANCE
from remat.evaluation.statistics import holm
from remat.runs.evidence import Representation

# A share that differs by less than a fifth is not called off, however many examples show it: the
# four-fifths rule of the US Uniform Guidelines on Employee Selection Procedures (1978), both ways.
_LEAST_RATIO = 0.8


def representation(
    evaluated: Mapping[str, Column],
    training: Mapping[str, Column],
    population: Mapping[str, Mapping[Any, float]],
) -> tuple[Representation, ...]:
    """Compare the share of every group of every feature with that in the reference.

    The reference is the stated population where the feature has one, tested by the exact binomial
    test, else the training data, a sample itself, tested by Fisher's exact test; all p-values are
    adjusted together (Holm 1979). A group is off where its share differs significantly at 5% and
    by more than a fifth; a group of the reference that does not occur at all is missing.
    """
    found = [
        row
        for feature, column in evaluated.items()
        for row in (
            _against_population(feature, column, population[feature])
            if feature in population
            else _against_training(feature, column, training[feature])
            if feature in training
            else ()
        )
    ]
    adjusted = holm([row.adjusted_p_value for row in found if row.adjusted_p_value is not None])
    return tuple(
        row.model_copy(update={"adjusted_p_value": p, "is_off": _is_off(row, p)})
        for row, p in zip(found, adjusted, strict=True)
    )


def check_population(
    population: Mapping[str, Mapping[Any, float]], evaluated: Mapping[str, Column]
) -> None:
    """Refuse a population that names no feature, or whose shares are none.

    Raises
    ------
    WorkloadError: naming the feature, and what was found.
    """
    for feature, shares in population.items():
        if feature not in evaluated:
            known = ", ".join(map(repr, evaluated)) or "none"
            raise WorkloadError(
                f"population names the feature {feature!r}; the workload's features are {known}."
            )
        total = sum(shares.values())
        if any(share < 0 for share in shares.values()) or abs(total - 1) > 0.01:
            raise WorkloadError(
                f"the shares of population[{feature!r}] must be positive and sum to 1, they sum "
                f"to {total:.4g}."
            )


def _against_population(
    feature: str, column: Column, shares: Mapping[Any, float]
) -> Iterator[Representation]:
    from scipy.stats import binomtest

    stated = {str(name): share for name, share in shares.items()}
    grouping = Grouping(feature=feature, values=tuple(stated))
    counts = np.bincount(grouping.codes(column), minlength=len(grouping.labels))
    for label, count in zip(grouping.labels, counts, strict=True):
        share = min(stated.get(label, 0.0), 1.0)
        if count or share:
            p_value = float(binomtest(int(count), len(column), share).pvalue)
            yield _row(feature, label, share, int(count), len(column), p_value)


def _against_training(feature: str, column: Column, training: Column) -> Iterator[Representation]:
    from scipy.stats import fisher_exact

    # a feature with few values is grouped by all of them, also by those of the evaluation alone
    grouping = group(feature, training)
    if not grouping.edges:
        grouping = group(feature, np.concatenate([training, column]))
    size = len(grouping.labels)
    counts = np.bincount(grouping.codes(column), minlength=size)
    known = np.bincount(grouping.codes(training), minlength=size)
    for label, count, reference in zip(grouping.labels, counts, known, strict=True):
        if count or reference:
            table = [[count, len(column) - count], [reference, len(training) - reference]]
            p_value = float(fisher_exact(table).pvalue)
            share = float(reference / len(training))
            yield _row(feature, label, share, int(count), len(column), p_value)


def _row(
    feature: str, label: str, share: float, count: int, total: int, p_value: float
) -> Representation:
    return Representation(
        feature=feature,
        group=label,
        reference_share=share,
        evaluated_share=count / total,
        num_evaluated=count,
        adjusted_p_value=p_value,
        is_missing=count == 0 and share > 0 and label not in (MISSING, OTHER),
    )


def _is_off(row: Representation, p_value: float) -> bool:
    shares = sorted([row.reference_share, row.evaluated_share])
    return p_value < SIGNIFICANCE and shares[0] < _LEAST_RATIO * shares[1]
