"""What a plan and a guard add to a step beside the recomputation, counted and not timed."""

from __future__ import annotations

import itertools
import statistics

import pytest

from benchmarks.overhead import TINY, WAYS, median_interval, python_calls, trained

# Python calls that a region adds to torch's own checkpoint around the same block, and a guard to a
# step: 34 and 12 were counted, beside some 860 per block for the checkpoint itself.
MOST_CALLS_OF_REGION = 36
MOST_CALLS_OF_GUARD = 20


@pytest.mark.slow
def test_a_region_adds_few_calls_to_a_checkpoint():
    """A plan over all blocks takes a fixed small number of calls per block more than torch's."""
    depth = 3
    calls = {name: python_calls(trained(way, blocks=depth, **TINY)) for name, way in WAYS.items()}
    assert calls["pure"] < calls["torch"]
    assert 0 < calls["plan"] - calls["torch"] <= MOST_CALLS_OF_REGION * depth
    assert 0 < calls["guard"] - calls["plan"] <= MOST_CALLS_OF_GUARD


@pytest.mark.parametrize("count", [5, 8, 11])
def test_interval_of_the_median_covers_it(count):
    """Its coverage by enumeration of all samples below and above the median is as stated."""
    values = [float(v) for v in range(1, count + 1)]
    found = median_interval([v * 1.5 for v in reversed(values)], confidence=0.9)
    assert found["median"] == statistics.median(values) * 1.5
    low, high = (int(found[end] / 1.5) for end in ("low", "high"))

    def covers(first, last):
        """How often the median lies between two order statistics, by the signs of all values."""
        samples = itertools.product((False, True), repeat=count)
        return sum(first <= sum(below) < last for below in samples) / 2**count

    assert covers(low, high) >= 0.9 or (low, high) == (1, count)
    assert low == 1 or covers(low + 1, high - 1) < 0.9
