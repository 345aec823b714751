"""Lower bound: what any recomputation of ops must cost at least to stay within a budget.

NOTE [ The bound ]
Decisions are made per op of the forward pass: whether it ever runs again (r). At a moment of the
step, a cut, storages that the program itself refers to are alive under every plan, and so are those
that no forward op made, and those that backward has read and autograd has not yet released. Any
other storage that a forward op made is resident (a) or not. For each cut separately, q says whether
an op runs again after it:
1. A storage whose saved tensor is first read after the cut is resident, or its op runs again.
2. An op that runs again after the cut needs each of its inputs: alive by itself, resident, not yet
   made, or made by an op that runs again after the cut as well.
3. What is resident, packed where it can be (see NOTE [ Packing ]), and what is alive by itself is
   within the budget.
4. An op that runs again after any cut runs again: r >= q, the same r for all cuts.
The least sum of seconds * r, relaxed to fractions, bounds every plan that keeps the order of the
program's ops, its own references, and autograd's releases, whatever it drops: single ops or whole
regions, nested or run several times. In small programmes, where a few large storages may decide,
that r is whole is used as far as HiGHS' cuts at the root of its search go.

Where inequality 2 is left out (storages of a few KiB, values before they were written in place),
the bound is lower, and still holds. It leaves out the working set of recomputation itself, when in
backward it happens, that ops run a second and third time, and what regions cost beside their ops.
Programs that are changed, such as losses in slices, and tensors that move to the host, are other
problems: it does not bound them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import highspy
import numpy as np
from numpy.typing import NDArray

from remat.cost.model import StepCost
from remat.planner.packing import find_packings, least_bytes
from remat.planner.recipes import find_recipes
from remat.planner.spans import Facts
from remat.planner.timeline import Timeline
from remat.trace.records import BASE_KINDS, EMPTY_OPS, FORWARD, StepTrace

_MIB = float(2**20)
_NUM_CUTS = 16
# Smaller storages are there whenever they are needed, and take no bytes of the budget.
_CRUMB_BYTES = 4096
# Most storages looked at over all cuts: the programme's size, half a second on one core.
_MOST_STORAGES = 8_000
# Programmes with at most this many entries are also tightened by what whole numbers imply.
_MOST_WHOLE = 20_000
# The programme is solved to about seven digits: what is returned stays below its true optimum.
_CAUTION = 1e-6


def lower_bound_seconds(timeline: Timeline, cost: StepCost, budget_bytes: int) -> float:
    """Bound from below the seconds of any op-level recomputation within a budget.

    A linear programme over several moments of the step; see NOTE [ The bound ] for the plans that
    it covers. Infinite if no such plan can stay within the budget. It may not be reachable.
    """
    alive = timeline.curve(()).alive
    over = np.flatnonzero(alive > budget_bytes)
    if not len(over):
        return 0.0
    needs = _Needs(timeline.trace, cost)
    programme = _BoundProgramme(cost.op_seconds)
    looked_at = 0
    for tick in _cuts(alive, over):
        if looked_at > _MOST_STORAGES:
            break
        looked_at += programme.add_cut(needs, tick, budget_bytes - int(alive[tick]))
    return programme.minimum() * (1 - _CAUTION)


def _cuts(alive: NDArray[np.int64], over: NDArray[np.int64]) -> list[int]:
    """Return the worst tick of each stretch over the budget, the worst of all first."""
    stretches = np.array_split(over, min(_NUM_CUTS, len(over)))
    worst = [int(ticks[np.argmax(alive[ticks])]) for ticks in stretches]
    return sorted(worst, key=lambda tick: -int(alive[tick]))


class _Needs:
    """Which storages a trace needs when, and which ops make them from which others."""

    def __init__(self, trace: StepTrace, cost: StepCost) -> None:
        facts = Facts(trace, cost)
        packings = find_packings(facts, find_recipes(facts).values())
        self._least: dict[int, int] = {}
        self._ops = trace.ops
        self.births = [storage.birth for storage in trace.storages]
        self.sizes = [storage.size_bytes for storage in trace.storages]
        self._makers: dict[int, int] = {}
        self._crumbs: set[int] = set()
        for position, op in enumerate(trace.ops):
            if op.phase != FORWARD:
                continue
            for number in op.fresh:
                storage = trace.storages[number]
                if storage.kind in BASE_KINDS:
                    continue
                if storage.size_bytes >= _CRUMB_BYTES:
                    self._makers[number] = position
                    self._least[number] = least_bytes(packings, number, storage.size_bytes)
                else:
                    self._crumbs.add(number)
        self._sources: dict[int, tuple[int, ...]] = {}
        self._natural = np.array(
            [(*span, n) for n, s in enumerate(trace.storages) for span in s.intervals],
            dtype=np.int64,
        ).reshape(-1, 3)
        self._handles = np.array(
            [(h.pack, h.end, h.unpack, h.storage) for h in trace.handles], dtype=np.int64
        ).reshape(-1, 4)

    def least_bytes(self, storage: int) -> int:
        """Return what a storage that a forward op makes takes at least, while it waits."""
        return self._least[storage]

    def maker(self, storage: int) -> int | None:
        """Return the forward op that makes a storage, or `None` if it counts as given."""
        return self._makers.get(storage)

    def crumbs(self, storages: set[int]) -> set[int]:
        """Return those of some storages that forward ops make and that are too small to count."""
        return storages & self._crumbs

    def sources(self, op: int) -> tuple[int, ...]:
        """Return the storages that other forward ops make and this one reads."""
        known = self._sources.get(op)
        if known is None:
            record = self._ops[op]
            given = () if record.name in EMPTY_OPS else record.inputs
            read = set(given).difference(record.fresh)
            known = tuple(sorted(s for s in read if self._makers.get(s, op) != op))
            self._sources[op] = known
        return known

    def alive(self, tick: int) -> set[int]:
        """Return the storages that are alive at a tick under every plan."""
        first, last, storages = self._natural.T
        natural = storages[(first <= tick) & (tick <= last)]
        _, end, unpack, storages = self._handles.T
        in_use = storages[(unpack >= 0) & (unpack <= tick) & (tick <= end)]
        return {*natural.tolist(), *in_use.tolist()}

    def saved(self, tick: int) -> tuple[set[int], set[int]]:
        """Return the storages that saved tensors hold, and those of them that are read later."""
        pack, end, unpack, storages = self._handles.T
        held = (pack <= tick) & (tick <= end)
        return set(storages[held].tolist()), set(storages[held & (unpack > tick)].tolist())


class _BoundProgramme:
    """The linear programme, cut by cut; seconds relative to their sum and bytes in MiB."""

    def __init__(self, op_seconds: Sequence[float]) -> None:
        self._seconds = op_seconds
        self._costs: list[float] = []
        self._again: dict[int, int] = {}  # op -> column of r
        self._lows: list[float] = []
        self._highs: list[float] = []
        self._starts: list[int] = [0]
        self._columns: list[int] = []
        self._values: list[float] = []

    def add_cut(self, needs: _Needs, tick: int, spare_bytes: int) -> int:
        """Add the inequalities of one cut; returns how many storages it looks at.

        `spare_bytes` is the budget less what is alive at the tick when everything is kept.
        """
        alive = needs.alive(tick)
        saved = needs.saved(tick)
        held, read_later = (
            {s for s in group if s not in alive and needs.maker(s) is not None} for group in saved
        )
        resident: dict[int, int] = {}
        after: dict[int, int] = {}  # op -> column of q
        waiting: list[int] = []

        def runs_after(op: int) -> int:
            if op not in after:
                after[op] = self._variable(0.0)
                waiting.append(op)
                self._row(((self._runs_again(op), 1.0), (after[op], -1.0)), low=0.0)
            return after[op]

        def is_resident(storage: int) -> int:
            if storage not in resident:
                resident[storage] = self._variable(0.0)
            return resident[storage]

        for storage in sorted(read_later):
            again = runs_after(_made_by(needs, storage))
            self._row(((is_resident(storage), 1.0), (again, 1.0)), low=1.0)
        while waiting:
            op = waiting.pop()
            for storage in needs.sources(op):
                if storage in alive or needs.births[storage] > tick:
                    continue
                again = runs_after(_made_by(needs, storage))
                terms = ((is_resident(storage), 1.0), (again, 1.0), (after[op], -1.0))
                self._row(terms, low=0.0)
        spare_bytes += sum(needs.sizes[s] for s in held | needs.crumbs(saved[0] - alive))
        self._row(
            ((column, needs.least_bytes(s) / _MIB) for s, column in resident.items()),
            high=spare_bytes / _MIB,
        )
        return len(resident)

    def minimum(self) -> float:
        """Return the least seconds, infinite if the inequalities cannot all hold."""
        scale = max(sum(self._costs), 1e-12)
        programme = highspy.HighsLp()
        programme.num_col_, programme.num_row_ = len(self._costs), len(self._lows)
        programme.col_cost_ = np.array(self._costs) / scale
        programme.col_lower_ = np.zeros(len(self._costs))
        programme.col_upper_ = np.ones(len(self._costs))
        programme.row_lower_ = np.array(self._lows)
        programme.row_upper_ = np.array(self._highs)
        programme.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        programme.a_matrix_.start_ = np.array(self._starts, dtype=np.int32)
        programme.a_matrix_.index_ = np.array(self._columns, dtype=np.int32)
        programme.a_matrix_.value_ = np.array(self._values)
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        solver.silent()
        solver.setOptionValue("threads", 1)
        is_whole = len(self._columns) <= _MOST_WHOLE
        if is_whole:
            whole = set(self._again.values())
            programme.integrality_ = [
                highspy.HighsVarType.kInteger if c in whole else highspy.HighsVarType.kContinuous
                for c in range(len(self._costs))
            ]
            # The root's cuts, and neither a search nor a heuristic: only the bound is wanted.
            solver.setOptionValue("mip_max_nodes", 1)
            solver.setOptionValue("mip_heuristic_effort", 0.0)
        solver.passModel(programme)
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        if status in (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,  # every variable is bounded
        ):
            return math.inf
        if is_whole:
            return max(0.0, float(info.mip_dual_bound)) * scale
        # Short of its optimum a linear programme bounds nothing.
        is_solved = status == highspy.HighsModelStatus.kOptimal
        return max(0.0, float(info.objective_function_value)) * scale if is_solved else 0.0

    def _runs_again(self, op: int) -> int:
        if op not in self._again:
            self._again[op] = self._variable(self._seconds[op])
        return self._again[op]

    def _variable(self, cost: float) -> int:
        self._costs.append(cost)
        return len(self._costs) - 1

    def _row(
        self,
        terms: Iterable[tuple[int, float]],
        low: float = -highspy.kHighsInf,
        high: float = highspy.kHighsInf,
    ) -> None:
        for column, value in terms:
            self._columns.append(column)
            self._values.append(value)
        self._starts.append(len(self._columns))
        self._lows.append(low)
        self._highs.append(high)


def _made_by(needs: _Needs, storage: int) -> int:
    op = needs.maker(storage)
    assert op is not None
    return op
