"""Curves: seconds against work for each family of ops, from times of many ops."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from remat.cost.calibration import Curve
from remat.cost.families import family_of, work_of
from remat.trace.records import Op, OpSignature

# Ops within half an octave of work count as alike; their median time is one point.
_BINS_PER_OCTAVE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOp:
    """One op of a probe and what it took."""

    op: Op
    signature: OpSignature
    seconds: float


def curves_of(timed: Iterable[TimedOp]) -> tuple[Curve, ...]:
    """Fit one rising curve for each family and dtype: medians of bins, made monotone.

    Monotone by pool-adjacent-violators (Ayer et al. 1955): where more work was timed as taking
    less, the bins share their mean of logarithms.
    """
    gathered: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for one in timed:
        family = family_of(one.op.name)
        work = work_of(one.signature, one.op.flops, one.op.moved_bytes)
        if work > 0 and one.op.dtype:
            place = round(_BINS_PER_OCTAVE * math.log2(work))
            gathered[family, one.op.dtype][place].append((float(work), one.seconds))
    return tuple(
        Curve(family=family, dtype=dtype, points=_rising(bins))
        for (family, dtype), bins in sorted(gathered.items())
    )


def _rising(bins: dict[int, list[tuple[float, float]]]) -> tuple[tuple[float, float], ...]:
    works = [statistics.geometric_mean(w for w, _ in bins[place]) for place in sorted(bins)]
    logs = [math.log(statistics.median(s for _, s in bins[place])) for place in sorted(bins)]
    pools: list[tuple[float, int]] = []  # mean and size
    for value in logs:
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    level = [math.exp(mean) for mean, size in pools for _ in range(size)]
    return tuple(zip(works, level, strict=True))
