"""The solver against every possible plan, and the timeline against simulation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from remat.fit import Fit


class Residual(nn.Module):
    """x + linear(gelu(linear(x))), with an optional norm and dropout."""

    def __init__(self, width: int, inner: int, norm: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.body(self.norm(x)))


def square_mean(model, batch):
    return model(batch).square().mean()


def all_choices(options, chosen=(), start=0):
    """Every set of options that may be chosen together."""
    yield frozenset(chosen)
    for position in range(start, len(options)):
        if not any(options[position].excludes(options[other]) for other in chosen):
            yield from all_choices(options, (*chosen, position), position + 1)


@pytest.mark.parametrize("widths", [(16, 64), (48, 16, 32)])
def test_cheapest_equals_the_best_of_all_plans(widths):
    """At every budget the solver's cost is the least among all plans, found by brute force."""
    model = nn.Sequential(*(Residual(24, inner, norm=True, dropout=0.1) for inner in widths))
    fit = Fit(model, torch.randn(64, 24), loss=square_mean).plain
    plans = [
        (fit.timeline.curve(chosen).peak_bytes, fit.solver.cost(chosen))
        for chosen in all_choices(fit.options)
    ]
    assert len(plans) > 50
    least = min(peak for peak, _ in plans)
    for budget in sorted({peak for peak, _ in plans})[::3]:
        best = min(cost for peak, cost in plans if peak <= budget)
        solution = fit.solver.cheapest(budget)
        assert solution is not None
        assert solution.peak_bytes <= budget
        assert solution.seconds == pytest.approx(best, rel=1e-5)
    assert fit.solver.cheapest(least - 1) is None
    assert fit.solver.least_peak().peak_bytes <= least * (1 + 1e-3)


@st.composite
def module_trees(draw):
    """Random trees of modules: chains, branches, shared modules, dropout and batch norm."""
    width = draw(st.sampled_from([8, 16]))

    def leaf():
        kind = draw(st.integers(0, 4))
        if kind == 0:
            return nn.Sequential(
                nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)
            )
        if kind == 1:
            return Residual(width, draw(st.sampled_from([8, 32])), norm=True, dropout=0.2)
        if kind == 2:
            return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(True))
        if kind == 3:
            return nn.Dropout(0.3)
        return nn.LayerNorm(width)

    def tree(depth):
        parts = [
            tree(depth - 1) if depth and draw(st.booleans()) else leaf()
            for _ in range(draw(st.integers(1, 3)))
        ]
        if draw(st.booleans()):
            parts.append(parts[0])  # one module called twice
        return nn.Sequential(*parts)

    return nn.Sequential(nn.Linear(width, width), tree(2), tree(1)), width


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(module_trees(), st.data())
def test_timeline_equals_simulation_on_random_trees(built, data):
    """The peak by the timeline of one trace is that of a traced run with the plan applied."""
    model, width = built
    fit = Fit(model, torch.randn(32, width), loss=square_mean, optimizer=None).plain
    chosen: set[int] = set()
    for position in data.draw(st.permutations(range(len(fit.options)))):
        option = fit.options[position]
        fits = not any(option.excludes(fit.options[p]) for p in chosen)
        if fits and data.draw(st.booleans()):
            chosen.add(position)
    simulated = fit.simulate(chosen).peak_bytes
    assert fit.timeline.curve(chosen).peak_bytes == pytest.approx(simulated, rel=1e-4, abs=256)


def test_more_budget_never_costs_more():
    """Over twenty rising budgets the cost falls, and none becomes infeasible again."""
    model = nn.Sequential(*(Residual(32, 32 * (1 + i % 3), True, 0.1) for i in range(8)))
    fit = Fit(model, torch.randn(128, 32), loss=square_mean).plain
    least, most = fit.solver.least_peak().peak_bytes, fit.keep_all_peak_bytes
    costs = []
    for step in range(20):
        solution = fit.solver.cheapest(least + (most - least) * step // 19)
        assert solution is not None
        costs.append(solution.seconds)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0 < costs[0]


def test_bound_is_below_the_best_of_all_plans():
    """No plan of any budget recomputes for less than the lower bound."""
    from remat.planner.bound import lower_bound_seconds

    model = nn.Sequential(*(Residual(24, inner, True, 0.0) for inner in (16, 64)))
    fit = Fit(model, torch.randn(64, 24), loss=square_mean).plain
    bounds = []
    for chosen in all_choices(fit.options):
        peak = fit.timeline.curve(chosen).peak_bytes
        bound = lower_bound_seconds(fit.timeline, fit.cost, peak)
        assert bound <= sum(fit.options[p].seconds for p in chosen) + 1e-12
        bounds.append(bound)
    assert max(bounds) > 0
