"""Solver: the cheapest choice of regions whose whole timeline stays within a budget.

A mixed integer programme picks options; memory rows are added only where a solution violates the
budget, until none does. Exact over its options when it ends as optimal: the programme with fewer
rows is a relaxation, and its solution satisfies every row.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import highspy
import numpy as np

from remat.planner.records import Outcome
from remat.planner.rows import HOST_TICK, Linear, Row, RowBuilder, host_row
from remat.planner.timeline import Curve, Timeline

_MIB = float(2**20)
_WINDOWS = 12  # most rows added between two solves, each from its own stretch of the step


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
    """Solve one trace's timeline for budgets; rows found for one budget serve the next."""

    def __init__(
        self,
        timeline: Timeline,
        *,
        time_limit_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        host_budget_bytes: int | None = None,
    ) -> None:
        self.timeline = timeline
        self.options = timeline.options
        self._builder = RowBuilder(timeline)
        self._rows: dict[int, Row] = {}
        if host_budget_bytes is not None:
            self._rows[HOST_TICK] = host_row(timeline.options, host_budget_bytes)
        self._time_limit_s = time_limit_s
        self._clock = clock

    def cost(self, chosen: Iterable[int]) -> float:
        """Return the seconds that recomputing the chosen options takes."""
        return sum(self.options[p].seconds + self.options[p].overhead_seconds for p in chosen)

    def cheapest(
        self, budget_bytes: int, candidates: Iterable[frozenset[int]] = ()
    ) -> Solution | None:
        """Return the cheapest choice within the budget, or `None` if there is none.

        Arguments
        ---------
        candidates: choices known from elsewhere; the best that fits is the fallback if time ends.
        """
        best = self._best_fitting(budget_bytes, [frozenset(), *candidates])
        if best is not None and not best.chosen:
            return self._ended(best, Outcome.OPTIMAL, 0.0, 0)
        # The smaller space first: its solution starts the larger one, and stands if time ends.
        selective = [p for p, option in enumerate(self.options) if option.saved_ops]
        if selective:
            whole = self._search(budget_bytes, best, excluded=selective)
            if whole is not None and (best is None or whole.seconds < best.seconds):
                best = whole
        return self._search(budget_bytes, best)

    def _search(
        self, budget_bytes: int, best: Solution | None, excluded: Iterable[int] = ()
    ) -> Solution | None:
        """Solve, add the rows that the solution violates, and repeat; `best` is the fallback."""
        programme = _Programme(self, self._rows.values(), budget_bytes=budget_bytes)
        programme.exclude(excluded)
        deadline = self._clock() + self._time_limit_s
        bound, solves = 0.0, 0
        slack: dict[int, int] = {}
        while True:
            if best is not None:
                programme.start_from(best.chosen)
            remaining = deadline - self._clock()
            if remaining <= 0:
                return self._ended(best, Outcome.TIMED_OUT, bound, solves)
            result = programme.solve(remaining)
            solves += 1
            if result.is_infeasible:
                return self._ended(best, Outcome.FEASIBLE, bound, solves) if slack else None
            bound = max(bound, result.bound) if not slack else bound
            if result.chosen is None:
                return self._ended(best, Outcome.TIMED_OUT, bound, solves)
            curve = self.timeline.curve(result.chosen)
            if curve.peak_bytes <= budget_bytes:
                outcome = Outcome.TIMED_OUT if result.is_cut_short else Outcome.OPTIMAL
                if slack and outcome is Outcome.OPTIMAL:
                    outcome = Outcome.FEASIBLE
                found = self._solution(result.chosen, curve, outcome, bound, solves)
                if best is not None and best.seconds <= found.seconds:
                    return self._ended(best, outcome, bound, solves)
                return found
            for tick, excess in self._violations(curve, budget_bytes):
                known = self._rows.get(tick)
                if known is None:
                    known = self._rows[tick] = self._builder.row(tick)
                if tick in programme.ticks:
                    # The row and the timeline disagree here: ask the row for that much more.
                    slack[tick] = slack.get(tick, 0) + excess
                    programme.tighten(tick, slack[tick])
                else:
                    programme.add(known)

    def least_peak(self, candidates: Iterable[frozenset[int]] = ()) -> Solution:
        """Return the choice with the lowest peak that was found."""
        tried = [self._measured(c) for c in (frozenset(), *candidates)]
        best = min(tried, key=lambda s: (s.peak_bytes, s.seconds))
        programme = _Programme(self, self._rows.values(), budget_bytes=None)
        deadline = self._clock() + self._time_limit_s
        solves = 0
        outcome = Outcome.TIMED_OUT
        while (remaining := deadline - self._clock()) > 0:
            programme.start_from(best.chosen, best.peak_bytes)
            result = programme.solve(remaining)
            solves += 1
            if result.chosen is None:
                break
            found = self._measured(result.chosen)
            if (found.peak_bytes, found.seconds) < (best.peak_bytes, best.seconds):
                best = found
            if best.peak_bytes <= result.bound * _MIB * (1 + 1e-4):
                outcome = Outcome.OPTIMAL
                break
            curve = self.timeline.curve(result.chosen)
            limit = int(result.bound * _MIB) if result.is_cut_short else result.peak_bytes
            fresh = [
                tick for tick, _ in self._violations(curve, limit) if tick not in programme.ticks
            ]
            if not fresh:
                outcome = Outcome.FEASIBLE
                break
            for tick in fresh:
                if tick not in self._rows:
                    self._rows[tick] = self._builder.row(tick)
                programme.add(self._rows[tick])
        return dataclasses.replace(
            best, outcome=outcome, num_rows=len(self._rows), num_solves=solves
        )

    def _measured(self, chosen: frozenset[int]) -> Solution:
        return self._solution(chosen, self.timeline.curve(chosen), Outcome.FEASIBLE, 0.0, 0)

    def _solution(
        self, chosen: frozenset[int], curve: Curve, outcome: Outcome, bound: float, solves: int
    ) -> Solution:
        return Solution(
            chosen=chosen,
            seconds=self.cost(chosen),
            peak_bytes=curve.peak_bytes,
            outcome=outcome,
            bound_seconds=bound,
            num_rows=len(self._rows),
            num_solves=solves,
        )

    def _best_fitting(
        self, budget_bytes: int, candidates: Iterable[frozenset[int]]
    ) -> Solution | None:
        fitting = [s for s in map(self._measured, candidates) if s.peak_bytes <= budget_bytes]
        return min(fitting, key=lambda s: (s.seconds, s.peak_bytes), default=None)

    def _ended(
        self, best: Solution | None, outcome: Outcome, bound: float, solves: int
    ) -> Solution | None:
        if best is None:
            return None
        return dataclasses.replace(
            best,
            outcome=outcome,
            bound_seconds=bound,
            num_rows=len(self._rows),
            num_solves=solves,
        )

    def _violations(self, curve: Curve, budget_bytes: int) -> list[tuple[int, int]]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    chosen: frozenset[int] | None
    bound: float
    peak_bytes: int
    is_infeasible: bool
    is_cut_short: bool


class _Programme:
    """The mixed integer programme in HiGHS: minimize seconds under rows, or the peak itself.

    Bytes are in MiB and costs relative to the sum of all options, to keep the numbers near one.
    """

    def __init__(self, solver: Solver, rows: Iterable[Row], *, budget_bytes: int | None) -> None:
        self._options = solver.options
        self._budget = budget_bytes
        self._scale = max(solver.cost(range(len(solver.options))), 1e-12)
        self.ticks: dict[int, int] = {}
        self._joins: dict[frozenset[Linear], int] = {}
        self._highs = highspy.Highs()  # type: ignore[no-untyped-call]
        self._highs.silent()
        self._highs.setOptionValue("mip_rel_gap", 1e-6)
        self._highs.setOptionValue("mip_abs_gap", 1e-9)
        self._highs.setOptionValue("mip_feasibility_tolerance", 1e-9)
        self._highs.setOptionValue("primal_feasibility_tolerance", 1e-9)
        self._highs.setOptionValue("threads", 1)
        for position in range(len(self._options)):
            self._highs.addVar(0.0, 1.0)
            self._highs.changeColIntegrality(position, highspy.HighsVarType.kInteger)
            cost = solver.cost([position]) / self._scale
            self._highs.changeColCost(position, cost if budget_bytes is not None else cost * 1e-4)
        self._peak = -1
        if budget_bytes is None:
            self._peak = self._add_variable(highspy.kHighsInf)
            self._highs.changeColCost(self._peak, 1.0)
        self._exclude_nested()
        for row in rows:
            self.add(row)

    def _add_variable(self, upper: float) -> int:
        self._highs.addVar(0.0, upper)
        return self._highs.getNumCol() - 1

    def _exclude_nested(self) -> None:
        """At most one option of each chain of nested calls is chosen."""
        chains = {
            frozenset(
                position
                for position, other in enumerate(self._options)
                if other.start <= option.start <= other.end
            )
            for option in self._options
        }
        for chain in chains:
            if len(chain) > 1 and not any(chain < other for other in chains):
                self._add_row(-highspy.kHighsInf, 1.0, dict.fromkeys(chain, 1.0))

    def exclude(self, positions: Iterable[int]) -> None:
        """Leave options out of the choice."""
        for position in positions:
            self._highs.changeColBounds(position, 0.0, 0.0)

    def _add_row(self, low: float, high: float, coefficients: dict[int, float]) -> int:
        columns = np.array(list(coefficients), dtype=np.int32)
        values = np.array(list(coefficients.values()), dtype=np.float64)
        self._highs.addRow(low, high, len(columns), columns, values)
        return self._highs.getNumRow() - 1

    def add(self, row: Row) -> None:
        """Add the row of a tick."""
        coefficients = {p: size / _MIB for p, size in row.coefficients.items() if size}
        for join, size in row.joins.items():
            coefficients[self._join(join)] = size / _MIB
        high = -row.constant / _MIB
        if row.limit_bytes is not None:
            high += row.limit_bytes / _MIB
        elif self._budget is None:
            coefficients[self._peak] = -1.0
        else:
            high += self._budget / _MIB
        self.ticks[row.tick] = self._add_row(-highspy.kHighsInf, high, coefficients)

    def tighten(self, tick: int, by_bytes: int) -> None:
        """Lower the right side of a tick's row."""
        assert self._budget is not None
        number = self.ticks[tick]
        high = self._highs.getLp().row_upper_[number] - by_bytes / _MIB
        self._highs.changeRowBounds(number, -highspy.kHighsInf, high)

    def _join(self, expressions: frozenset[Linear]) -> int:
        known = self._joins.get(expressions)
        if known is not None:
            return known
        column = self._joins[expressions] = self._add_variable(1.0)
        for expression in expressions:
            coefficients = {column: 1.0}
            coefficients.update(dict.fromkeys(expression.plus, -1.0))
            coefficients.update(dict.fromkeys(expression.minus, 1.0))
            self._add_row(float(expression.constant), highspy.kHighsInf, coefficients)
        return column

    def start_from(self, chosen: frozenset[int], peak_bytes: int | None = None) -> None:
        """Give the search a choice to start from."""
        values = np.zeros(self._highs.getNumCol())
        values[list(chosen)] = 1.0
        for join, column in self._joins.items():
            values[column] = max(
                e.constant + len(e.plus & chosen) - len(e.minus & chosen) for e in join
            )
        if peak_bytes is not None and self._peak >= 0:
            values[self._peak] = peak_bytes / _MIB
        solution = highspy.HighsSolution()
        solution.col_value = list(values)
        self._highs.setSolution(solution)

    def solve(self, time_limit_s: float) -> _Result:
        """Solve, within a time limit."""
        # HiGHS counts its run time over all solves of one instance.
        self._highs.setOptionValue("time_limit", self._highs.getRunTime() + max(time_limit_s, 0.1))
        self._highs.run()
        status = self._highs.getModelStatus()
        info = self._highs.getInfo()
        infeasible = status in (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,
        )
        has_solution = not infeasible and info.primal_solution_status == 2
        chosen = None
        peak = 0
        if has_solution:
            values = self._highs.getSolution().col_value
            chosen = frozenset(p for p in range(len(self._options)) if values[p] > 0.5)
            peak = round(values[self._peak] * _MIB) if self._peak >= 0 else 0
        scale = self._scale if self._budget is not None else 1.0
        return _Result(
            chosen=chosen,
            bound=info.mip_dual_bound * scale,
            peak_bytes=peak,
            is_infeasible=infeasible,
            is_cut_short=status != highspy.HighsModelStatus.kOptimal,
        )
