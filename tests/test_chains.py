"""Chains and their recursion: which calls may run as one, and plans against every other plan."""

import itertools
import math

import pytest
import torch
from torch import nn

import remat
from remat.cost.devices import find_device
from remat.cost.model import CostModel, cost_step
from remat.fit import Fit, plan_policy
from remat.planner.chains import find_chains
from remat.planner.options import OptionBuilder
from remat.planner.policies import AllBlocks
from remat.planner.recursion import find_recursions
from remat.planner.spans import Facts, Span
from remat.planner.timeline import Timeline
from remat.trace.capture import capture
from tests.models import Block, square_mean

WIDTH = 16


class Loop(nn.Module):
    """Calls its blocks in a loop; subclasses do something else than pass the result on."""

    def __init__(self, count=5):
        super().__init__()
        self.blocks = nn.ModuleList(self.make() for _ in range(count))

    def make(self):
        return Block(WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class WithOthers(nn.Module):
    """Takes a mask by position and a scale by keyword, and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.body = Block(WIDTH)

    def forward(self, x, mask, *, scale, options=None):
        return self.body(x) * mask * scale[0], None


class PassesOthers(Loop):
    def make(self):
        return WithOthers()

    def forward(self, x):
        mask, scale = torch.ones(WIDTH), (torch.full((), 0.5), "note")
        for block in self.blocks:
            x = block(x, mask, scale=scale, options={"causal": True})[0]
        return x


class AddsBetween(Loop):
    def forward(self, x):
        for block in self.blocks:
            x = block(x + 1)
        return x


class Detaches(Loop):
    def forward(self, x):
        for block in self.blocks:
            x = block(x.detach())
        return x


class KeepsAll(Loop):
    def forward(self, x):
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return torch.stack(kept).sum(0)


class OtherArguments(PassesOthers):
    def forward(self, x):
        for block in self.blocks:
            x = block(x, torch.ones(WIDTH), scale=(torch.ones(()),))[0]
        return x


class OtherConstants(PassesOthers):
    def forward(self, x):
        mask, scale = torch.ones(WIDTH), (torch.ones(()),)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, scale=scale, options=i)[0]
        return x


class Twice(Loop):
    def forward(self, x):
        for block in self.blocks:
            x = block(block(x))
        return x


class GivesTwo(Block):
    def forward(self, x, other=None):
        return super().forward(x), x * 2


class UsesTwo(Loop):
    def make(self):
        return GivesTwo(WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x, other = block(x)
        return x + other


def chain_lengths(model):
    trace = capture(model, torch.randn(8, WIDTH), loss=square_mean)
    blocks = (c for c in find_chains(trace) if trace.calls[c[0]].module in ("blocks.0", "0"))
    return [len(chain) for chain in blocks]


@pytest.mark.parametrize(
    "model", [Loop(), PassesOthers(), nn.Sequential(*(Block(WIDTH) for _ in range(5)))]
)
def test_calls_that_pass_their_result_on_are_a_chain(model):
    """Blocks in a loop or a Sequential, with equal other arguments and tuple results, are one."""
    assert chain_lengths(model) == [5]


@pytest.mark.parametrize(
    "kind",
    [AddsBetween, Detaches, KeepsAll, OtherArguments, OtherConstants, Twice, UsesTwo],
)
def test_calls_between_which_something_happens_are_no_chain(kind):
    """Another op, tensor, argument or reference between two calls, or a second call, parts them."""
    assert chain_lengths(kind()) == []


def test_a_changed_argument_parts_a_chain_where_it_changes():
    """Blocks that are given another mask from the third on are two chains."""

    class TwoMasks(PassesOthers):
        def forward(self, x):
            masks, scale = torch.ones(2, WIDTH), (torch.ones(()),)
            one, two = masks.unbind()
            for i, block in enumerate(self.blocks):
                x = block(x, one if i < 2 else two, scale=scale)[0]
            return x

    trace = capture(TwoMasks(), torch.randn(8, WIDTH), loss=square_mean)
    lengths = [len(c) for c in find_chains(trace) if trace.calls[c[0]].module.count(".") == 1]
    assert lengths == [2, 3]


# -- the recursion --------------------------------------------------------------------------------


def recursions_of(model, batch, optimizer=None):
    trace = capture(model, batch, loss=square_mean, optimizer=optimizer)
    cost = cost_step(trace, CostModel(device=find_device("cpu")))
    facts = Facts(trace, cost)
    (plans,) = find_recursions(facts, Timeline(facts.trace, facts.cost, ()))
    return facts, [(*_peak_and_cost(facts, p), sum(o.seconds for o in p)) for p in plans]


def _peak_and_cost(facts, plan):
    timeline = Timeline(facts.trace, facts.cost, tuple(plan))
    cost = sum(option.seconds + option.overhead_seconds for option in plan)
    return timeline.curve(range(len(plan))).peak_bytes, cost


def every_forest(calls):
    """Every choice of disjoint runs of calls, each with every choice of smaller runs inside."""
    if not calls:
        yield ()
        return
    for rest in every_forest(calls[1:]):
        yield rest
    for stop in range(1, len(calls) + 1):
        inner = list(every_forest(calls[: stop - 1]))
        inner += [(*f, Span(calls[stop - 1 : stop])) for f in inner if stop > 1]
        for inside, rest in itertools.product(inner, every_forest(calls[stop:])):
            yield (Span(calls[:stop], inside), *rest)


@pytest.mark.parametrize("widths", [(16,) * 4, (16, 64, 16, 128)])
def test_no_choice_of_nested_runs_is_cheaper_than_the_plan(widths):
    """At the peak of every choice of runs, nested in any way, the plan costs as little or less."""
    model = nn.Sequential(*(Residual(inner) for inner in widths))
    batch = torch.randn(4096, WIDTH)
    fit = Fit(model, batch, loss=square_mean, optimizer=None).plain
    facts = Facts(fit.trace, fit.cost)
    (chain,) = (c for c in find_chains(facts.trace) if len(c) == len(widths))
    builder = OptionBuilder(facts)
    every = [
        _peak_and_cost(facts, [builder.option(span) for span in forest])
        for forest in every_forest(chain)
    ]
    assert len(every) > 200
    for peak in sorted({peak for peak, _ in every})[::4]:
        # The recurrences count in slots of memory.
        solution, _ = fit.solve(int(peak * 1.001) + 512)
        assert solution.seconds <= min(cost for p, cost in every if p <= peak) * (1 + 1e-6)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


@pytest.mark.slow
def test_activations_of_a_chain_grow_slower_than_the_square_root_of_its_length():
    """From 25 to 200 blocks, at no more than one forward again, and at the least peak."""
    lengths, least, once = (25, 50, 100, 200), [], []
    for count in lengths:
        model = nn.Sequential(*(Residual(4 * WIDTH) for _ in range(count)))
        facts, found = recursions_of(model, torch.randn(4096, WIDTH))
        gradients = sum(s.size_bytes for s in facts.trace.storages if s.kind == "gradients")
        fixed = facts.trace.base_bytes + gradients
        forward = facts.cost.forward_seconds
        least.append(min(peak for peak, *_ in found) - fixed)
        once.append(min(peak for peak, _, seconds in found if seconds <= forward) - fixed)
    for peaks in (least, once):
        exponent = math.log(peaks[-1] / peaks[0]) / math.log(lengths[-1] / lengths[0])
        assert exponent <= 0.5, peaks


def test_a_deep_chain_is_planned_below_its_blocks():
    """A 40-block chain fits where recomputing every single block does not, and verifies."""
    model = nn.Sequential(*(Residual(2 * WIDTH) for _ in range(40)))
    batch = torch.randn(512, WIDTH)
    step = {"loss": square_mean, "optimizer": None}
    blocks = plan_policy(model, batch, AllBlocks(), **step)
    made = remat.plan(model, batch, int(0.7 * blocks.predicted_peak_bytes), **step)
    assert any(region.followers for region in made.regions)
    proof = remat.verify(model, batch, made, **step)
    assert proof.identical
    assert proof.measured_peak_bytes <= made.budget_bytes
