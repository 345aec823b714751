"""Tightening: a search repeated with fewer bytes until what it finds needs no more than a budget.

A search knows what a choice requests by the timeline. What it needs is a little more, or, where a
caching allocator reserves memory, quite different.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from remat.planner.records import Outcome
from remat.planner.solver import Solution

_CLOSE = 0.01  # of the bytes asked for: what lies unused between blocks moves by more

Search = Callable[[int], Solution | None]
Excess = Callable[[frozenset[int]], int]


def tighten(search: Search, excess: Excess, allowed: int, *, tries: int) -> Solution | None:
    """Search with as much less as the last choice needed too much; `None` if that ends nowhere.

    Arguments
    ---------
    search: from the bytes that a choice may request to the cheapest one, or `None`.
    excess: the bytes that a choice needs above the budget; none where it fits.
    """
    for _ in range(tries):
        solution = search(allowed)
        if solution is None:
            return None
        over = excess(solution.chosen)
        if over <= 0:
            return solution
        allowed -= over
    return None


def bracket(search: Search, excess: Excess, allowed: int, *, tries: int) -> Solution | None:
    """Search between the most that was requested and fitted, and the least that did not.

    For needs that do not rise with requests: the cheapest of the choices that fit is returned.
    `search` and `excess` are those of `tighten`.
    """
    low, high = 0, allowed
    first = best = None
    for _ in range(tries):
        solution = search(allowed)
        over = excess(solution.chosen) if solution is not None else 0
        first = first or solution
        if solution is not None and over > 0:
            high = solution.peak_bytes
        else:
            low = allowed
            if solution is not None and (best is None or solution.seconds < best.seconds):
                best = solution
        if first is None or best is first or high - low <= _CLOSE * high:
            break
        less = min(allowed - over, int(high * (1 - _CLOSE)))
        allowed = (low + high) // 2 if low else max(1, less)
    if best is None or first is None or best is first:
        return best
    # The bound holds for all that request no more than the budget.
    return dataclasses.replace(best, outcome=Outcome.FEASIBLE, bound_seconds=first.bound_seconds)
