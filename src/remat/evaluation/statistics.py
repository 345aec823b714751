"""Intervals and tests on plain numbers: Wilson, Student, bootstrap, equivalence, Holm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remat.errors import MissingPackageError
from remat.runs.evidence import Interval

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
# Sums over examples, shape (..., K), to the figure that they make, shape (...).
Figure = Callable[[Floats], Floats]

LEVEL = 0.95
# Resamples of a bootstrap: the ends of a 95% interval then rest on the 25 most extreme ones.
RESAMPLES = 1000
# Resamples that are drawn at once: bounds the memory to this many weights for each example.
_CHUNK = 50
# More examples are summed into so many random groups first, and groups are drawn: the spread of a
# sum over many examples is the same, and a million of them would take minutes.
_MOST_DRAWN = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EquivalenceTest:
    """Two one-sided t-tests: `difference` is the mean with its interval, `p_value` the larger."""

    difference: Interval
    p_value: float
    is_equivalent: bool


def require_scipy() -> None:
    """Fail now, not after training, where the package for statistics is missing.

    Raises
    ------
    MissingPackageError: with the install command.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("scipy", "eval", "Statistics of an evaluation") from error


def wilson(successes: int, count: int, level: float = LEVEL) -> Interval:
    """Give a share with Wilson's score interval (Wilson 1927), which holds for few examples too.

    Raises
    ------
    ValueError: if there is no example, or more successes than examples.
    """
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"expected 0 <= successes <= count and a count, got {successes}, {count}.")
    from scipy.stats import norm

    z = float(norm.ppf((1 + level) / 2))
    share = successes / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(
        share * (1 - share) / count + z * z / (4 * count * count)
    )  # fmt: skip
    # At the ends the bound is 0 or 1 by algebra; in floats it may miss them by a rounding.
    low = 0.0 if successes == 0 else max(center - half, 0.0)
    high = 1.0 if successes == count else min(center + half, 1.0)
    return Interval(value=share, low=low, high=high, level=level, method="Wilson score")


def student(values: Sequence[float] | Floats, level: float = LEVEL) -> Interval:
    """Give the mean with Student's t interval: for differences of pairs, the paired one.

    Raises
    ------
    ValueError: with fewer than two values.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.size < 2:
        raise ValueError(f"an interval needs at least two values, got {found.size}.")
    from scipy.stats import t

    mean = float(found.mean())
    error = float(found.std(ddof=1)) / math.sqrt(found.size)
    half = float(t.ppf((1 + level) / 2, found.size - 1)) * error
    return Interval(value=mean, low=mean - half, high=mean + half, level=level, method="Student t")


def equivalence_test(
    differences: Sequence[float], margin: float, significance: float = 0.05
) -> EquivalenceTest:
    """Test that the mean of paired differences lies within the margin (Schuirmann 1987).

    Two one-sided t-tests, against `mean <= -margin` and `mean >= margin`; both have to be
    significant. That is so exactly where the interval of level 1 - 2 x significance, which is
    given with it, lies within the margin.

    Raises
    ------
    ValueError: with fewer than two differences, or a margin that is not positive.
    """
    if not margin > 0:
        raise ValueError(f"the margin must be positive, got {margin!r}.")
    interval = student(differences, level=1 - 2 * significance)
    interval = interval.model_copy(update={"method": "Student t on paired differences"})
    found = np.asarray(differences, dtype=np.float64)
    error = float(found.std(ddof=1)) / math.sqrt(found.size)
    mean = interval.value
    if error == 0:  # all differences are equal: the mean is known without error
        p_value = 0.0 if abs(mean) < margin else 1.0
    else:
        from scipy.stats import t

        below = float(t.sf((mean + margin) / error, found.size - 1))
        above = float(t.cdf((mean - margin) / error, found.size - 1))
        p_value = max(below, above)
    return EquivalenceTest(
        difference=interval, p_value=p_value, is_equivalent=p_value < significance
    )


def bootstrap(sums: Floats, figure: Figure, *, seed: int = 0, level: float = LEVEL) -> Interval:
    """Give a figure with its percentile bootstrap interval (Efron 1979), examples drawn anew.

    Arguments
    ---------
    sums: (N, K), what each example adds to the sums that the figure is made from. Examples are
        drawn whole, so that tokens of one text or pixels of one image stay together.
    figure: (..., K) -> (...).
    seed: of the resampling; the same seed gives the same interval.

    Complexity: 1,000 x N x K products; memory 50 x N. From 10,000 examples on they are drawn in
    as many random groups.

    Raises
    ------
    ValueError: without an example.
    """
    if len(sums) == 0:
        raise ValueError("a bootstrap needs at least one example.")
    generator = np.random.default_rng(seed)
    value = float(figure(sums.sum(axis=0)))
    if len(sums) > _MOST_DRAWN:
        starts = np.linspace(0, len(sums), _MOST_DRAWN, endpoint=False).astype(np.int64)
        sums = np.add.reduceat(sums[generator.permutation(len(sums))], starts, axis=0)
    count = len(sums)
    shares = np.full(count, 1 / count)
    drawn = [
        figure(generator.multinomial(count, shares, size=_CHUNK).astype(np.float64) @ sums)
        for _ in range(0, RESAMPLES, _CHUNK)
    ]
    values = np.concatenate(drawn)
    low, high = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)])
    return Interval(
        value=value,
        low=float(low),
        high=float(high),
        level=level,
        method=f"bootstrap over examples, {RESAMPLES:,} resamples",
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for testing several at once (Holm 1979): the family errs at most at 5%.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted


def halves(count: int, seed: int) -> tuple[Mask, Mask]:
    """Split examples into two random halves, one to fit or search on, the other to judge by."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(count)[: count // 2]] = True
    return chosen, ~chosen
