"""Latency and throughput: requests of several forms in turn, percentiles, ratios with noise."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from remat.evaluation.timing import Prepare, time_in_turn
from remat.runs.evidence import Interval, Latency

# Six pairs are the fewest whose range is a 95% interval of their median.
LEAST_ROUNDS, MOST_ROUNDS, WARMUP_ROUNDS = 6, 200, 1
LEVEL = 0.95


def latency_of(form: str, batch_size: int, seconds: Sequence[float]) -> Latency:
    """Give percentiles (linear interpolation between ranks) and throughput of timed requests."""
    p50, p95, p99 = np.percentile(np.asarray(seconds, dtype=np.float64), (50, 95, 99))
    return Latency(
        form=form,
        batch_size=batch_size,
        num_requests=len(seconds),
        p50_seconds=float(p50),
        p95_seconds=float(p95),
        p99_seconds=float(p99),
        examples_per_second=batch_size * len(seconds) / math.fsum(seconds),
    )


def request_in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, ...]]:
    """Time warm requests of every form in turn, for about so many seconds in all.

    Each form answers twice before it is counted. Rounds are as many as fit, between 6 and 200; the
    n-th request of one form and of another ran in the same round, one after the other.
    """
    begin = clock()
    for call in calls.values():
        call()
    one_round = max(clock() - begin, 1e-9)
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / one_round - WARMUP_ROUNDS)))
    times = time_in_turn(
        {label: _prepared(call) for label, call in calls.items()},
        rounds=rounds,
        warmup_rounds=WARMUP_ROUNDS,
        clock=clock,
    )
    return {label: found.seconds for label, found in times.items()}


def _prepared(call: Callable[[], object]) -> Prepare:
    @contextlib.contextmanager
    def ready() -> Iterator[Callable[[], object]]:
        yield call

    return ready


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Give the median of pairwise ratios, with the interval of the sign test (exact, any noise).

    Order statistics k and n + 1 - k around the median, with the largest k such that
    2 P(Binomial(n, 1/2) < k) is at most 5%. Fewer than six pairs give their whole range, at the
    level that it has.
    """
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    count = len(ratios)
    outside, rank = 2 / 2**count, 1
    while rank < count // 2:
        further = outside + 2 * math.comb(count, rank) / 2**count
        if further > 1 - LEVEL:
            break
        outside, rank = further, rank + 1
    return Interval(
        value=float(np.median(ratios)),
        low=ratios[rank - 1],
        high=ratios[count - rank],
        level=min(LEVEL, 1 - outside),
        method=f"sign test on {count} pairs measured in turn",
    )
