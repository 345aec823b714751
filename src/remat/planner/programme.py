"""Programme: the choice of options under given memory rows, as a mixed integer programme in HiGHS.

Written anew for every set of rows: that takes milliseconds, and the search then depends on the rows
alone, not on what was solved before. Constraints that order blocks which are alike, or leave out
options that are dominated under the rows, were tried and make the search slower: HiGHS finds the
symmetries by itself, and such constraints hide them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from remat.planner.rows import Linear, Row

MIB = float(2**20)

_HAS_SOLUTION = 2  # HiGHS' primal status of a feasible solution


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a search found: a choice or `None`, a bound on its objective, and how it ended."""

    chosen: frozenset[int] | None
    bound: float  # seconds, or MiB where the peak is minimized
    peak_bytes: int
    is_infeasible: bool
    is_cut_short: bool
    work: int  # nodes of the search tree times nonzeros of the programme


def cliques(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return the largest sets of intervals (their positions) that have a tick in common.

    Options exclude each other if their ticks [start, end] overlap, so one of each set can be
    chosen; sets of one are left out. Intervals that overlap pairwise share a tick (Helly), so that
    every exclusion is in some set. Linear in the sum of the sets' sizes.
    """
    events = []
    for position, (start, end) in enumerate(intervals):
        events += [(start, 0, position), (end, 1, position)]
    running: set[int] = set()
    has_grown = False
    found: list[tuple[int, ...]] = []
    for _, is_end, position in sorted(events):
        if not is_end:
            running.add(position)
            has_grown = True
            continue
        if has_grown and len(running) > 1:
            found.append(tuple(sorted(running)))
        has_grown = False
        running.remove(position)
    return found


class Programme:
    """Minimize seconds such that every row is within the budget; or the peak, without a budget.

    Bytes are in MiB and costs relative to the sum of all options, to keep the numbers near one.
    """

    def __init__(
        self,
        costs: Sequence[float],
        exclusions: Sequence[tuple[int, ...]],
        rows: Iterable[Row],
        *,
        budget_bytes: int | None,
    ) -> None:
        self._num_options = len(costs)
        self._budget = budget_bytes
        self._scale = max(sum(costs), 1e-12)
        self._joins: dict[frozenset[Linear], int] = {}
        self._highs = _quiet_highs()
        weight = 1.0 if budget_bytes is not None else 1e-4
        # All at once: HiGHS looks through every column at each change.
        num = self._num_options
        columns = np.arange(num, dtype=np.int32)
        self._highs.addVars(num, np.zeros(num), np.ones(num))
        self._highs.changeColsIntegrality(
            num, columns, np.full(num, int(highspy.HighsVarType.kInteger), dtype=np.uint8)
        )
        self._highs.changeColsCost(num, columns, weight / self._scale * np.array(costs))
        self._peak = -1
        if budget_bytes is None:
            self._peak = self._add_variable(highspy.kHighsInf)
            self._highs.changeColCost(self._peak, 1.0)
        for clique in exclusions:
            self._add_row(-highspy.kHighsInf, 1.0, dict.fromkeys(clique, 1.0))
        for row in rows:
            self._add_memory(row)

    def start_from(self, chosen: frozenset[int], peak_bytes: int = 0) -> None:
        """Give the search a choice to start from."""
        values = np.zeros(self._highs.getNumCol())
        values[list(chosen)] = 1.0
        for join, column in self._joins.items():
            values[column] = max(
                e.constant + len(e.plus & chosen) - len(e.minus & chosen) for e in join
            )
        if self._peak >= 0:
            values[self._peak] = peak_bytes / MIB
        solution = highspy.HighsSolution()
        solution.col_value = list(values)
        self._highs.setSolution(solution)

    def solve(self, *, relative_gap: float, most_work: int, time_limit_s: float) -> Result:
        """Search until the gap is closed, the work is done, or this thread has used the time."""
        nonzeros = max(1, self._highs.getNumNz())
        self._highs.setOptionValue("mip_max_nodes", max(1, most_work // nonzeros))
        self._highs.setOptionValue("mip_rel_gap", relative_gap)
        self._interrupt_after(time_limit_s)
        self._highs.run()
        status = self._highs.getModelStatus()
        info = self._highs.getInfo()
        infeasible = status in (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,
        )
        chosen = None
        peak = 0
        if not infeasible and info.primal_solution_status == _HAS_SOLUTION:
            values = self._highs.getSolution().col_value
            chosen = frozenset(p for p in range(self._num_options) if values[p] > 0.5)
            peak = round(values[self._peak] * MIB) if self._peak >= 0 else 0
        return Result(
            chosen=chosen,
            bound=info.mip_dual_bound * (self._scale if self._budget is not None else 1.0),
            peak_bytes=peak,
            is_infeasible=infeasible,
            is_cut_short=status != highspy.HighsModelStatus.kOptimal,
            work=max(1, int(info.mip_node_count)) * nonzeros,
        )

    def _interrupt_after(self, seconds: float) -> None:
        """Stop the search after so many seconds of this thread's own: HiGHS' limit is wall time."""
        end = time.thread_time() + max(seconds, 0.1)

        def check(event: highspy.highs.HighsCallbackEvent) -> None:
            if time.thread_time() >= end:
                assert event.data_in is not None  # there in every callback that may interrupt
                event.data_in.user_interrupt = True

        self._highs.cbMipInterrupt.subscribe(check)

    # -- writing the programme --------------------------------------------------------------------

    def _add_variable(self, upper: float) -> int:
        self._highs.addVar(0.0, upper)
        return self._highs.getNumCol() - 1

    def _add_row(self, low: float, high: float, coefficients: dict[int, float]) -> None:
        columns = np.array(list(coefficients), dtype=np.int32)
        values = np.array(list(coefficients.values()), dtype=np.float64)
        self._highs.addRow(low, high, len(columns), columns, values)

    def _add_memory(self, row: Row) -> None:
        coefficients = {p: size / MIB for p, size in row.coefficients.items() if size}
        for join, size in row.joins.items():
            coefficients[self._join(join)] = size / MIB
        high = -row.constant / MIB
        if row.limit_bytes is not None:
            high += row.limit_bytes / MIB
        elif self._budget is None:
            coefficients[self._peak] = -1.0
        else:
            high += self._budget / MIB
        self._add_row(-highspy.kHighsInf, high, coefficients)

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


def _quiet_highs() -> highspy.Highs:
    highs = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.silent()
    highs.setOptionValue("mip_abs_gap", 1e-9)
    highs.setOptionValue("mip_feasibility_tolerance", 1e-9)
    highs.setOptionValue("primal_feasibility_tolerance", 1e-9)
    highs.setOptionValue("threads", 1)
    return highs
