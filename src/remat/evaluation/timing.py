"""Step times of several variants, taken in turn: a slow minute of the machine hits all alike."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np

from remat.runs.records import StepTimes

# Entering applies a variant's plan and gives the step to be timed; leaving takes the plan off.
Prepare = Callable[[], AbstractContextManager[Callable[[], object]]]


def turns(labels: Sequence[str], rounds: int) -> list[str]:
    """Order the timed steps: every variant once a round, each round starting one further on.

    The rotation keeps a variant from always following the same neighbour, whose allocator and
    cache it would inherit.

    >>> turns(["a", "b", "c"], 2)
    ['a', 'b', 'c', 'b', 'c', 'a']
    """
    shifted = (turn % len(labels) for turn in range(rounds) if labels)
    return [label for first in shifted for label in (*labels[first:], *labels[:first])]


def time_in_turn(
    variants: Mapping[str, Prepare],
    *,
    rounds: int,
    warmup_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, StepTimes]:
    """Time one step of every variant per round; warm-up rounds run first and are not counted."""
    labels = list(variants)
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    with _collector_at_rest():
        for done, label in enumerate(turns(labels, warmup_rounds + rounds)):
            if done % len(labels) == 0:
                gc.collect()  # only what the last round left: the rest is frozen
            with variants[label]() as step:
                start = clock()
                step()
                elapsed = clock() - start
            if done >= warmup_rounds * len(labels):
                seconds[label].append(elapsed)
            if (done + 1) % len(labels) == 0:
                on_round((done + 1) // len(labels))
    return {label: summarize_times(seconds[label], warmup_rounds) for label in labels}


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Hold the garbage collector: a collection would be charged to whichever step was running.

    What lives already, torch's million objects above all, is frozen: looking through it took as
    long as a step, and collections between the rounds need only look at what the rounds made.
    """
    was_enabled, is_frozen_by_others = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    gc.collect()
    if not is_frozen_by_others:
        gc.freeze()
    try:
        yield
    finally:
        if not is_frozen_by_others:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def summarize_times(seconds: Sequence[float], warmup_rounds: int) -> StepTimes:
    """Give median and interquartile range (linear interpolation) with the times they come from."""
    low, median, high = np.percentile(np.asarray(seconds, dtype=np.float64), (25, 50, 75))
    return StepTimes(
        seconds=tuple(seconds),
        median_seconds=float(median),
        iqr_seconds=float(high - low),
        warmup_rounds=warmup_rounds,
    )
