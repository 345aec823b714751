"""Whether one run's steps are slower than another's, beyond what the measurements' noise explains.

NOTE [ Slower ]
Steps count as slower by more than a tolerance where three things hold: the median grew by more
than the tolerance and three standard errors of it (from the interquartile ranges, as for a normal
distribution); a rank-sum test of the times, with the tolerance taken off, says so at 0.2%; and
both hold for the times as they are and for the times over those of the yardstick, a fixed piece of
work that both runs timed in turn with their steps. The first alone fails on few rounds, the second
alone cannot see how much; together they failed 0 to 0.8% of comparisons of six variants with
themselves over normal, heavy-tailed and two-peaked noise of 1 to 30%, from five rounds on. The
third is for what independent noise does not have: another machine, a neighbour that came or went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from remat.runs.records import StepTimes

LEAST_ROUNDS = 5
_LEVEL = 0.002
_STANDARD_ERRORS = 3.0
# Of a normal distribution: its interquartile range, and the standard error of the median over that
# of the mean.
_IQR_PER_SIGMA = 1.349
_MEDIAN_ERROR = 1.2533

_Logs = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeChange:
    """How the step time of one run stands to that of another.

    `ratio` is median over median, `machine_ratio` that of the yardstick (`None` where one of the
    runs has none), `noise` the relative growth that chance alone may show, `is_slower` the answer
    for the tolerance that was asked about.
    """

    before_seconds: float
    after_seconds: float
    ratio: float
    machine_ratio: float | None
    noise: float
    is_slower: bool

    @property
    def growth(self) -> float:
        """Relative growth of the median, the machine's own change taken off where it is known."""
        return self.ratio / (self.machine_ratio or 1.0) - 1


def compare_times(
    before: StepTimes,
    after: StepTimes,
    *,
    tolerance: float,
    yardsticks: tuple[StepTimes | None, StepTimes | None] = (None, None),
) -> TimeChange | None:
    """Say whether `after` is slower than `before` by more than a tolerance; see NOTE [ Slower ].

    `None` where either has fewer than five rounds: noise could not be told from change.
    """
    if min(len(before.seconds), len(after.seconds)) < LEAST_ROUNDS:
        return None
    old, new = _logs(before.seconds), _logs(after.seconds)
    is_slower = _is_slower(old, new, tolerance)
    machine_ratio = None
    first, second = yardsticks
    if first is not None and second is not None:
        machine_ratio = second.median_seconds / first.median_seconds
        adjusted = _over(old, first), _over(new, second)
        is_slower = is_slower and _is_slower(*adjusted, tolerance)
    return TimeChange(
        before_seconds=before.median_seconds,
        after_seconds=after.median_seconds,
        ratio=math.exp(float(np.median(new) - np.median(old))),
        machine_ratio=machine_ratio,
        noise=math.expm1(_STANDARD_ERRORS * _error(old, new)),
        is_slower=is_slower,
    )


def _is_slower(old: _Logs, new: _Logs, tolerance: float) -> bool:
    allowed = math.log1p(tolerance)
    growth = float(np.median(new) - np.median(old))
    if growth <= allowed + _STANDARD_ERRORS * _error(old, new):
        return False
    level = max(_LEVEL, rank_sum_p(len(old) * len(new), len(new), len(old)))
    num_above = int((new[:, None] - allowed > old[None, :]).sum())
    return rank_sum_p(num_above, len(new), len(old)) <= level


def _error(old: _Logs, new: _Logs) -> float:
    """Standard error of the difference of the medians."""
    return math.hypot(*(_median_error(logs) for logs in (old, new)))


def _median_error(logs: _Logs) -> float:
    low, high = np.percentile(logs, (25, 75))
    return _MEDIAN_ERROR * float(high - low) / _IQR_PER_SIGMA / math.sqrt(len(logs))


def rank_sum_p(num_above: int, num_new: int, num_old: int) -> float:
    """Chance that so many pairs or more have the new one above, where both are alike.

    Exact, by the recurrence of Mann and Whitney (1947), for up to 400 pairs; by their normal
    approximation beyond.
    """
    if num_new * num_old > 400:
        mean = num_new * num_old / 2
        sigma = math.sqrt(num_new * num_old * (num_new + num_old + 1) / 12)
        return 0.5 * math.erfc((num_above - 0.5 - mean) / sigma / math.sqrt(2))
    counts = _rank_sum_counts(num_new, num_old)
    return sum(counts[num_above:]) / sum(counts)


@lru_cache(maxsize=64)
def _rank_sum_counts(num_new: int, num_old: int) -> tuple[int, ...]:
    """Count the orders of both samples by the number of pairs with the new one above."""
    if num_new == 0 or num_old == 0:
        return (1,)
    # the largest of all is an old one, above no new one, or a new one, above every old one
    old_last = _rank_sum_counts(num_new, num_old - 1)
    new_last = _rank_sum_counts(num_new - 1, num_old)
    counts = [0] * (num_new * num_old + 1)
    for above, count in enumerate(old_last):
        counts[above] += count
    for above, count in enumerate(new_last):
        counts[above + num_old] += count
    return tuple(counts)


def _over(logs: _Logs, yardstick: StepTimes) -> _Logs:
    """Take the yardstick off, round by round where both have the same rounds."""
    ruler = _logs(yardstick.seconds)
    return logs - (ruler if len(ruler) == len(logs) else float(np.median(ruler)))


def _logs(seconds: Sequence[float]) -> _Logs:
    return np.log(np.maximum(np.asarray(seconds, dtype=np.float64), 1e-12))
