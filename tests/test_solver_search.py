"""How the solver searches: the same plan each time, a share of work per call, costs that fall."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.zoo import ZOO
from remat.fit import Fit
from remat.planner.bound import lower_bound_seconds
from remat.planner.programme import cliques
from remat.planner.records import Outcome
from remat.planner.solver import Solver
from remat.program import Program
from tests.models import Block, Recurrent, Tower, rising, square_mean

SMALL = {
    "blocks": lambda: nn.Sequential(*(Block(32) for _ in range(6))),
    "recurrent": lambda: Recurrent(32, 6),
    "tower": lambda: Tower(32),
}


def small_fit(name: str) -> Program:
    torch.manual_seed(0)
    return Fit(SMALL[name](), torch.randn(256, 32), loss=square_mean).plain


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=12))
def test_cliques_hold_every_overlap_and_nothing_else(drawn):
    """Two intervals are in one set exactly if they overlap, and a set's have a tick in common."""
    intervals = [(2 * start, 2 * (start + length) + 1) for start, length in drawn]
    found = cliques(intervals)
    together = {pair for clique in found for pair in itertools.combinations(clique, 2)}
    overlapping = {
        (a, b)
        for (a, (start, end)), (b, (first, last)) in itertools.combinations(enumerate(intervals), 2)
        if start <= last and first <= end
    }
    assert together == overlapping
    for clique in found:
        assert max(intervals[p][0] for p in clique) <= min(intervals[p][1] for p in clique)
        assert not any(set(clique) < set(other) for other in found)


@pytest.mark.parametrize("name", SMALL)
def test_twenty_budgets_planned_apart_never_cost_more_for_more(name):
    """Each budget has a solver of its own; costs fall, and all that is above the least is found."""
    fit = small_fit(name)
    least = fit.solver.least_peak().peak_bytes
    costs = []
    for budget in rising(least, fit.keep_all_peak_bytes, 20):
        solution = Solver(fit.timeline).cheapest(budget)
        assert solution is not None
        assert solution.outcome is Outcome.OPTIMAL
        assert solution.peak_bytes <= budget
        costs.append(solution.seconds)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0 < costs[0]


def test_solution_does_not_depend_on_what_was_solved_before():
    """Budgets in rising and in falling order, and one alone, give the same choices."""
    fit = small_fit("blocks")
    least = fit.solver.least_peak().peak_bytes
    budgets = rising(least, fit.keep_all_peak_bytes, 7)
    up, down = Solver(fit.timeline), Solver(fit.timeline)
    one_way = {b: up.cheapest(b) for b in budgets}
    other_way = {b: down.cheapest(b) for b in reversed(budgets)}
    assert one_way == other_way
    assert Solver(fit.timeline).cheapest(budgets[3]) == one_way[budgets[3]]


def test_rough_search_is_within_a_percent_and_claims_no_optimum():
    """One percent above the least cost at most, never called optimal, within the budget."""
    fit = small_fit("blocks")
    least = fit.solver.least_peak().peak_bytes
    for budget in rising(least, fit.keep_all_peak_bytes, 5)[1:-1]:
        rough = fit.solver.cheapest(budget, roughly=True)
        best = fit.solver.cheapest(budget)
        assert rough.outcome is Outcome.FEASIBLE
        assert best.outcome is Outcome.OPTIMAL
        assert rough.peak_bytes <= budget
        assert best.seconds <= rough.seconds <= 1.01 * best.seconds
        assert rough.bound_seconds <= best.seconds * (1 + 1e-5)


def test_search_with_little_work_is_repeatable_and_keeps_the_budget():
    """A search cut short by its share of work says so, is no dearer than what it was given."""
    fit = small_fit("blocks")
    known = frozenset(fit.blocks)
    budget = fit.timeline.curve(known).peak_bytes
    best = Solver(fit.timeline).cheapest(budget, [known])
    found = [Solver(fit.timeline, most_work=1).cheapest(budget, [known]) for _ in range(2)]
    assert best is not None
    assert found[0] is not None
    assert found[0] == found[1]
    assert found[0].peak_bytes <= budget
    assert best.seconds <= found[0].seconds <= fit.solver.cost(known)
    assert found[0].bound_seconds <= best.seconds * (1 + 1e-5)


def test_search_without_time_falls_back_on_the_choices_it_was_given():
    """One limit of time holds for the whole call; at its end the best known choice stands."""
    fit = small_fit("blocks")
    firsts = [frozenset(fit.blocks[:k]) for k in range(len(fit.blocks) + 1)]
    solver = Solver(fit.timeline, time_limit_s=0.0)
    least = min(fit.timeline.curve(c).peak_bytes for c in firsts)
    costs = []
    for budget in rising(least, fit.keep_all_peak_bytes, 20)[:-1]:
        solution = solver.cheapest(budget, firsts)
        assert solution is not None
        assert solution.chosen in firsts
        assert solution.outcome is Outcome.TIMED_OUT
        costs.append(solution.seconds)
    assert costs == sorted(costs, reverse=True)
    assert solver.cheapest(least - 1, firsts) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2s", "unet", "moe"])
def test_zoo_models_are_solved_to_the_optimum_and_monotone(name):
    """On real models with few options every budget is solved within its share of work."""
    case = ZOO[name].build()
    fit = Fit(case.model, case.batch, loss=case.loss).plain
    least = fit.solver.least_peak(fit._known).peak_bytes
    costs = []
    for budget in rising(least, fit.keep_all_peak_bytes, 12):
        solution = Solver(fit.timeline, time_limit_s=60.0).cheapest(budget)
        assert solution is not None
        assert solution.outcome is Outcome.OPTIMAL
        bound = lower_bound_seconds(fit.timeline, fit.cost, budget)
        assert bound <= sum(fit.options[p].seconds for p in solution.chosen)
        costs.append(solution.seconds)
    assert costs == sorted(costs, reverse=True)
