"""Solver: the cheapest choice of regions whose whole timeline stays within a budget.

A mixed integer programme picks options; memory rows are added only where a solution violates the
budget, until none does. Exact over its options when it ends as optimal: the programme with fewer
rows is a relaxation, and its solution satisfies every row.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from remat.planner.folding import Folding
from remat.planner.programme import MIB, Programme, Result
from remat.planner.records import Outcome
from remat.planner.rows import Row, RowBuilder, host_row
from remat.planner.timeline import Curve, Timeline

_WINDOWS = 12  # most rows added between two solves, each from its own stretch of the step
# Rows are collected from solutions near the optimum, which are found early; then the gap is closed.
_GAPS = (1e-2, 1e-6)
# Nodes of the search tree times nonzeros of the programme that one call may take: about 4 s on one
# core. A limit on work and not on time, so that a loaded machine gives the same plan.
MOST_WORK = 12_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Chosen options (positions), their cost in seconds, and the peak by the timeline."""

    chosen: frozenset[int]
    seconds: float
    peak_bytes: int
    outcome: Outcome
    bound_seconds: float
    num_rows: int
    num_solves: int


class Solver:
    """Solve one trace's timeline for budgets.

    The same call gives the same solution, whatever was solved before and however fast the machine
    is: a call ends after `most_work`, nodes of the search tree times nonzeros of the programme.
    Only `time_limit_s`, the limit of one call's searches together, depends on the processor: they
    are seconds of this thread's own, so that other work on the machine changes no plan.
    """

    def __init__(
        self,
        timeline: Timeline,
        *,
        time_limit_s: float = 10.0,
        most_work: int = MOST_WORK,
        clock: Callable[[], float] = time.thread_time,
        host_budget_bytes: int | None = None,
        folding: Folding | None = None,
    ) -> None:
        self.timeline = timeline
        self.options = timeline.options
        # To the picosecond: blocks that are alike differ in the last digits of their sums, and a
        # choice must not look dearer for that.
        self._costs = [round(o.seconds + o.overhead_seconds, 12) for o in self.options]
        self._folding = folding or Folding.of_each(len(self.options))
        self._column_costs = self._folding.costs(self._costs)
        self._cliques = self._folding.cliques(self.options)
        self._builder = RowBuilder(timeline)
        self._rows: dict[int, Row] = {}
        self._column_rows: dict[int, Row] = {}
        self._host_rows: list[Row] = []
        if host_budget_bytes is not None:
            row = host_row(timeline.options, host_budget_bytes)
            self._host_rows.append(self._folding.row(row))
        self._time_limit_s = time_limit_s
        self.most_work = most_work
        self._clock = clock

    def cost(self, chosen: Iterable[int]) -> float:
        """Return the seconds that recomputing the chosen options takes."""
        return math.fsum(self._costs[p] for p in chosen)

    def cheapest(
        self,
        budget_bytes: int,
        candidates: Iterable[frozenset[int]] = (),
        *,
        remaining: Callable[[], float] | None = None,
        roughly: bool = False,
    ) -> Solution | None:
        """Return the cheapest choice within the budget, or `None` if there is none.

        Arguments
        ---------
        candidates: choices known from elsewhere; the best that fits is the fallback if time ends.
        remaining: the seconds left, where several calls share one limit (see `deadline`).
        roughly: whether one percent above the least cost is close enough; then none is called
            optimal, but that of recomputing nothing.
        """
        search = _Search(self, budget_bytes, remaining or self.deadline())
        keep_all = self.timeline.curve(())
        if keep_all.peak_bytes <= budget_bytes:
            search.best = self.measured(frozenset())
            return search.ended(Outcome.OPTIMAL)
        search.add_rows(keep_all)
        search.start_from(candidates)
        for gap in _GAPS[:1] if roughly else _GAPS:
            solution = search.run(gap)
            if solution is None or solution.outcome is not Outcome.OPTIMAL:
                break
        return self._judged(solution, is_rough=roughly) if solution is not None else None

    def least_peak(self, candidates: Iterable[frozenset[int]] = ()) -> Solution:
        """Return the choice with the lowest peak that was found."""
        best = self._least_of((frozenset(), *candidates))
        ticks = {tick for tick, _ in self.violations(self.timeline.curve(()), best.peak_bytes)}
        deadline = self._clock() + self._time_limit_s
        solves, work = 0, self.most_work
        outcome = Outcome.TIMED_OUT
        while (remaining := deadline - self._clock()) > 0:
            if work <= 0:
                outcome = Outcome.FEASIBLE
                break
            programme = self.programme(ticks, None)
            self.start(programme, best)
            result = programme.solve(relative_gap=_GAPS[-1], most_work=work, time_limit_s=remaining)
            solves += 1
            work -= result.work
            chosen = self.chosen(result)
            if chosen is None:
                break
            curve = self.timeline.curve(chosen)
            found = self.measured(chosen, curve)
            if (found.peak_bytes, found.seconds) < (best.peak_bytes, best.seconds):
                best = found
            if best.peak_bytes <= result.bound * MIB * (1 + 1e-4):
                outcome = Outcome.OPTIMAL
                break
            # A search that is cut short at once knows no bound: minus infinity.
            bound_bytes = int(max(result.bound, 0.0) * MIB)
            limit = bound_bytes if result.is_cut_short else result.peak_bytes
            fresh = {tick for tick, _ in self.violations(curve, limit)} - ticks
            if not fresh:
                outcome = Outcome.FEASIBLE
                break
            ticks |= fresh
        return self._judged(
            dataclasses.replace(best, outcome=outcome, num_rows=len(ticks), num_solves=solves)
        )

    def _judged(self, solution: Solution, *, is_rough: bool = False) -> Solution:
        """Take back the claim of an optimum where the search was rough, or had not every choice."""
        if solution.outcome is not Outcome.OPTIMAL:
            return solution
        if not self._folding.has_every_choice:
            return dataclasses.replace(solution, outcome=Outcome.FEASIBLE, bound_seconds=0.0)
        return dataclasses.replace(solution, outcome=Outcome.FEASIBLE) if is_rough else solution

    def _least_of(self, candidates: Iterable[frozenset[int]]) -> Solution:
        """Return the candidate with the lowest peak, looking at no more curves than needed."""
        ticks = [tick for tick, _ in self.violations(self.timeline.curve(()), 0)]
        ranked = sorted((self.least_bytes(c, ticks), self.cost(c), sorted(c)) for c in candidates)
        best = self.measured(frozenset(ranked[0][2]))
        for least, _, chosen in ranked[1:]:
            if least >= best.peak_bytes:
                break
            found = self.measured(frozenset(chosen))
            best = min(best, found, key=lambda s: (s.peak_bytes, s.seconds))
        return best

    def least_bytes(self, chosen: frozenset[int], ticks: Iterable[int]) -> int:
        """Bound the peak of a choice from below by the rows of some ticks, without its curve.

        What is joined in a row is left out: it adds bytes or none.
        """
        rows = map(self.row, ticks)
        return max(row.constant + sum(row.coefficients.get(p, 0) for p in chosen) for row in rows)

    def row(self, tick: int) -> Row:
        """Return the row of a tick; each is written once."""
        known = self._rows.get(tick)
        if known is None:
            known = self._rows[tick] = self._builder.row(tick)
        return known

    def start(self, programme: Programme, best: Solution) -> None:
        """Give a search the best solution so far to start from, if it has the columns for it."""
        columns = self._folding.folded(best.chosen)
        if columns is not None:
            programme.start_from(columns, best.peak_bytes)

    def chosen(self, result: Result) -> frozenset[int] | None:
        """Return the options that a search found, if it found any choice."""
        return None if result.chosen is None else self._folding.unfolded(result.chosen)

    def programme(
        self, ticks: Iterable[int], budget_bytes: int | None, slack: dict[int, int] | None = None
    ) -> Programme:
        """Write the programme with the rows of these ticks, tighter by `slack` bytes of a tick."""
        rows = list(self._host_rows)
        for tick in sorted(ticks):
            row = self._column_rows.get(tick) or self._folding.row(self.row(tick))
            self._column_rows[tick] = row
            tighter = (slack or {}).get(tick, 0)
            rows.append(
                dataclasses.replace(row, constant=row.constant + tighter) if tighter else row
            )
        return Programme(self._column_costs, self._cliques, rows, budget_bytes=budget_bytes)

    def measured(self, chosen: frozenset[int], curve: Curve | None = None) -> Solution:
        """Return a choice with its cost and peak, not yet compared with others."""
        return Solution(
            chosen=chosen,
            seconds=self.cost(chosen),
            peak_bytes=(curve or self.timeline.curve(chosen)).peak_bytes,
            outcome=Outcome.FEASIBLE,
            bound_seconds=0.0,
            num_rows=0,
            num_solves=0,
        )

    def violations(self, curve: Curve, budget_bytes: int) -> list[tuple[int, int]]:
        """Return (tick, excess bytes) at the worst tick of each stretch that is over budget."""
        memory = curve.alive.copy()
        for tick, size in curve.replays:
            memory[tick] = max(int(memory[tick]), size)
        found = []
        for ticks in np.array_split(np.arange(len(memory)), _WINDOWS):
            if not len(ticks):
                continue
            worst = int(ticks[np.argmax(memory[ticks])])
            if memory[worst] > budget_bytes:
                found.append((worst, int(memory[worst]) - budget_bytes))
        return found

    def deadline(self) -> Callable[[], float]:
        """Start the limit; what is returned tells the seconds that remain of the limit."""
        end = self._clock() + self._time_limit_s
        return lambda: end - self._clock()


class _Search:
    """One call's search: the rows found so far, the best choice, and one limit of time."""

    def __init__(self, solver: Solver, budget_bytes: int, remaining: Callable[[], float]) -> None:
        self.best: Solution | None = None
        self._solver = solver
        self._budget = budget_bytes
        self._remaining = remaining
        self._ticks: set[int] = set()
        # Bytes that a row must ask for more, where it and the timeline disagree.
        self._slack: dict[int, int] = {}
        self._bound = 0.0
        self._solves = 0
        self._work = solver.most_work

    def start_from(self, candidates: Iterable[frozenset[int]]) -> None:
        """Take the cheapest candidate that fits as the best so far."""
        by_cost = sorted((self._solver.cost(c), sorted(c)) for c in candidates)
        for _, positions in by_cost:
            chosen = frozenset(positions)
            if self._solver.least_bytes(chosen, self._ticks) > self._budget:
                continue
            found = self._solver.measured(chosen)
            if found.peak_bytes <= self._budget:
                self.best = found
                return

    def add_rows(self, curve: Curve) -> None:
        """Ask for the budget wherever a curve is above it."""
        for tick, excess in self._solver.violations(curve, self._budget):
            if tick in self._ticks:
                self._slack[tick] = self._slack.get(tick, 0) + excess
            self._ticks.add(tick)

    def run(self, relative_gap: float) -> Solution | None:
        """Solve, add the rows that the solution violates, and repeat until it violates none."""
        while True:
            remaining = self._remaining()
            if remaining <= 0:
                return self.ended(Outcome.TIMED_OUT)
            if self._work <= 0:
                return self.ended(Outcome.FEASIBLE)
            programme = self._solver.programme(self._ticks, self._budget, self._slack)
            if self.best is not None:
                self._solver.start(programme, self.best)
            result = programme.solve(
                relative_gap=relative_gap, most_work=self._work, time_limit_s=remaining
            )
            self._solves += 1
            self._work -= result.work
            if result.is_infeasible:
                # Not every choice is one of columns: a candidate may still fit.
                return self.ended(Outcome.FEASIBLE)
            if not self._slack:
                self._bound = max(self._bound, result.bound)
            chosen = self._solver.chosen(result)
            if chosen is None:
                return self.ended(self._cut_short())
            curve = self._solver.timeline.curve(chosen)
            if curve.peak_bytes > self._budget:
                self.add_rows(curve)
                continue
            found = self._solver.measured(chosen, curve)
            if self.best is None or found.seconds < self.best.seconds:
                self.best = found
            if result.is_cut_short:
                return self.ended(self._cut_short())
            return self.ended(Outcome.FEASIBLE if self._slack else Outcome.OPTIMAL)

    def _cut_short(self) -> Outcome:
        """Say whether a search that was cut short ran out of time, or did its share of work."""
        return Outcome.TIMED_OUT if self._remaining() <= 0 else Outcome.FEASIBLE

    def ended(self, outcome: Outcome) -> Solution | None:
        """Return the best choice with how the search for it ended."""
        if self.best is None:
            return None
        return dataclasses.replace(
            self.best,
            outcome=outcome,
            bound_seconds=self._bound,
            num_rows=len(self._ticks),
            num_solves=self._solves,
        )
