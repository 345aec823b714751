"""Folding: many alike blocks are decided in groups, within the budget and near the best."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remat.fit import Fit
from remat.planner import folding
from remat.planner.blocks import find_blocks
from remat.planner.records import Outcome
from remat.planner.solver import Solver
from remat.program import Program
from tests.forced import slow_fit
from tests.models import Block
from tests.test_solver import Residual, square_mean


def deep(num_blocks: int) -> Program:
    """Trace a chain of blocks of which two kinds take turns every quarter."""
    quarter = num_blocks // 4
    blocks = (Residual(32, 64 + 32 * ((i // quarter) % 2), True, 0.0) for i in range(num_blocks))
    return Fit(nn.Sequential(*blocks), torch.randn(1024, 32), loss=square_mean).plain


def folded(program: Program, most_groups: int, monkeypatch: pytest.MonkeyPatch) -> folding.Folding:
    """Fold a program into fewer groups than deep models are."""
    monkeypatch.setattr(folding, "MOST_GROUPS", most_groups)
    blocks = find_blocks(program.trace)
    found = folding.fold(program.trace, program.options, blocks, ())
    assert found is not None
    return found


def test_few_blocks_are_not_folded():
    """Up to the limit every option is a column, and the search may claim an optimum."""
    program = deep(8)
    assert folding.fold(program.trace, program.options, find_blocks(program.trace), ()) is None
    solution = program.solver.cheapest(int(0.8 * program.keep_all_peak_bytes))
    assert solution is not None
    assert solution.outcome is Outcome.OPTIMAL


def dropping_and_moving(num_blocks: int) -> Program:
    """Blocks of which results may be packed, dropped, or moved to the host and fetched early."""
    model = nn.Sequential(*(Block(32) for _ in range(num_blocks)))
    return slow_fit(model, torch.randn(512, 32), host_budget="64MiB").plain


@pytest.mark.parametrize("make", [lambda: deep(12), lambda: dropping_and_moving(8)])
def test_columns_are_decisions_that_may_be_taken_together(monkeypatch, make):
    """Members of a column exclude nothing of each other, and every option has a column."""
    program = make()
    found = folded(program, 5, monkeypatch)
    assert len(found.columns) < len(program.options)
    assert all(found.columns_of)
    for column in found.columns:
        options = [program.options[p] for p in column]
        assert not any(a.excludes(b) for i, a in enumerate(options) for b in options[:i])
        assert options[0].seconds == pytest.approx(options[-1].seconds)
    cliques = {pair for clique in found.cliques(program.options) for pair in _pairs(clique)}
    for one, other in _pairs(range(len(found.columns))):
        excludes = any(
            program.options[p].excludes(program.options[q])
            for p in found.columns[one]
            for q in found.columns[other]
        )
        assert excludes == ((one, other) in cliques)


def _pairs(numbers):
    numbers = sorted(numbers)
    return [(a, b) for i, b in enumerate(numbers) for a in numbers[:i]]


def test_rows_of_columns_are_the_rows_of_their_options(monkeypatch):
    """For choices of columns, a folded row has the bytes of the curve wherever the row has."""
    program = deep(12)
    found = folded(program, 5, monkeypatch)
    taken: set[int] = set()
    for column in reversed(range(len(found.columns))):
        members = found.unfolded(taken)
        if not any(
            program.options[p].excludes(program.options[q])
            for p in found.columns[column]
            for q in members
        ):
            taken.add(column)
    chosen = found.unfolded(taken)
    assert found.unfolded(found.folded(chosen) or ()) == chosen
    for tick in range(0, program.trace.num_ticks, 37):
        row = program.solver.row(tick)
        assert _bytes(found.row(row), taken) == _bytes(row, chosen)


def _bytes(row, taken):
    total = row.constant + sum(size for p, size in row.coefficients.items() if p in taken)
    for join, size in row.joins.items():
        total += size * max(e.constant + len(e.plus & taken) - len(e.minus & taken) for e in join)
    return total


def test_plans_of_the_one_chain_are_candidates(monkeypatch):
    """They are no columns, and still found where nothing else fits; of several chains they are."""
    model = nn.Sequential(*(Residual(32, 64, True, 0.0) for _ in range(16)))
    program = Fit(model, torch.randn(1024, 32), loss=square_mean).plain
    monkeypatch.setattr(folding, "MOST_GROUPS", 8)
    blocks, plans = find_blocks(program.trace), program.chain_plans
    nested = {tuple(sorted(plan)) for plan in plans if len(plan) > 1}
    one = folding.fold(program.trace, program.options, blocks, [plans])
    several = folding.fold(program.trace, program.options, blocks, [plans[:1], plans[1:]])
    assert nested.isdisjoint(one.columns)
    assert nested <= set(several.columns)
    assert len(one.columns) < len(several.columns)
    solver = Solver(program.timeline, folding=one)
    budget = min(program.timeline.curve(plan).peak_bytes for plan in plans)
    assert solver.cheapest(budget - 1, plans) is None
    assert solver.cheapest(budget, plans).peak_bytes == budget
    assert solver.least_peak(plans).peak_bytes <= budget


@pytest.mark.slow
def test_folded_plans_keep_the_budget_and_cost_little_more(monkeypatch):
    """In groups, plans are within the budget, claim no optimum, and lose one group's blocks."""
    program = deep(16)
    grouped = Solver(program.timeline, folding=folded(program, 8, monkeypatch))
    least, most = program.solver.least_peak().peak_bytes, program.keep_all_peak_bytes
    assert grouped.least_peak().peak_bytes <= least + 0.05 * (most - least)
    for share in (0.3, 0.7):
        budget = int(least + share * (most - least))
        ours, best = grouped.cheapest(budget), program.solver.cheapest(budget)
        assert ours is not None
        assert best is not None
        assert program.timeline.curve(ours.chosen).peak_bytes <= budget
        assert ours.outcome is not Outcome.OPTIMAL
        assert best.seconds <= ours.seconds * (1 + 1e-6)
        assert (
            ours.seconds - best.seconds <= program.solver.cost(program.blocks) / 8
        )  # one group of eight
