"""Plans for what CUDA reserves: a fixed rule that fits is neither refused nor cheaper."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import remat
from remat.fit import Fit
from remat.planner.policies import simple_policies
from remat.planner.records import Outcome
from remat.planner.solver import Solution
from remat.planner.tightening import bracket, tighten
from tests.models import Block
from tests.test_solver import square_mean

MIB = 2**20


def solution(peak_bytes: int) -> Solution:
    """A choice that requests so much, and costs what it does not request."""
    return Solution(
        chosen=frozenset({peak_bytes}), seconds=100.0 - peak_bytes, peak_bytes=peak_bytes,
        outcome=Outcome.OPTIMAL, bound_seconds=1.0, num_rows=0, num_solves=1,
    )  # fmt: skip


@dataclasses.dataclass
class Requests:
    """A search over choices that request 1..100 bytes, of which the least is `least`."""

    least: int
    asked: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, allowed: int) -> Solution | None:
        self.asked.append(allowed)
        return solution(min(allowed, 100)) if allowed >= self.least else None


def needs(budget: int, more: dict[int, int]):
    """Return the excess of choices that need what they request, and more for some."""

    def excess(chosen: frozenset[int]) -> int:
        (requested,) = chosen
        return requested + more.get(requested, 0) - budget

    return excess


@pytest.mark.parametrize("way", [tighten, bracket])
def test_first_search_is_enough_where_it_fits(way):
    """Nothing is asked twice, and the optimum stays one."""
    search = Requests(least=10)
    found = way(search, needs(50, {}), 50, tries=6)
    assert (found.peak_bytes, found.outcome, search.asked) == (50, Outcome.OPTIMAL, [50])


@pytest.mark.parametrize("way", [tighten, bracket])
def test_nothing_is_found_where_nothing_can_be(way):
    """Requests above the budget end the search at once; needs above it, after a few tries."""
    assert way(Requests(least=60), needs(50, {}), 50, tries=6) is None
    always = dict.fromkeys(range(101), 45)
    search = Requests(least=10)
    assert way(search, needs(50, always), 50, tries=6) is None
    assert len(search.asked) <= 6


def test_bracket_goes_on_where_tightening_asks_for_too_little():
    """One choice that needs far more than it requests hides others that fit."""
    excess = needs(50, {50: 45})
    assert tighten(Requests(least=10), excess, 50, tries=8) is None
    found = bracket(Requests(least=10), excess, 50, tries=8)
    assert 45 <= found.peak_bytes < 50
    assert found.outcome is Outcome.FEASIBLE


@pytest.fixture(scope="module")
def step() -> Fit:
    """Four blocks planned for a CUDA device that is not here."""
    model = nn.Sequential(*(Block(256) for _ in range(4)))
    batch = torch.randn(4096, 256, device="meta")
    return Fit(model.to("meta"), batch, loss=square_mean, device="T4")


def test_no_rule_that_fits_is_refused_or_cheaper(step):
    """At what each rule needs, reserved, there is a plan, and it costs no more than that rule."""
    program = step.plain
    for policy in simple_policies(len(program.blocks)):
        fixed, simulation = program.policy(policy)
        budget = program.needed(simulation)
        found = program.solve(budget)
        assert found is not None, policy
        assert program.needed(found[1]) <= budget
        assert found[0].seconds <= fixed.seconds + 1e-12, policy


def test_least_budget_is_at_most_what_any_rule_needs(step):
    """The budget that an error names as the least: a plan for it is made, and none for less."""
    program = step.plain
    _, simulation = program.least_peak()
    least = program.needed(simulation)
    assert least <= min(
        program.needed(program.policy(policy)[1]) for policy in simple_policies(len(program.blocks))
    )
    with pytest.raises(remat.BudgetError) as caught:
        step.plan(least - 2 * MIB)
    assert caught.value.minimum_bytes <= least
    assert step.plan(caught.value.minimum_bytes).predicted_reserved_bytes is not None
