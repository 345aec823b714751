"""What a router chose in a region's forward is what it chooses when the region runs again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat.fit import Fit, plan_policy
from remat.planner.policies import AllBlocks
from remat.planner.records import Severity
from remat.program import Step
from remat.regions.apply import install, remove
from remat.rewriting.calls import sliced_blocks
from tests.models import square_mean

WIDTH, EXPERTS, USED = 16, 4, 2


def by_topk(scores):
    return scores.topk(USED, dim=-1)


def by_sort(scores):
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :USED], indices[:, :USED]


def by_largest(scores):
    values, indices = scores.max(dim=-1)
    return values.unsqueeze(-1), indices.unsqueeze(-1)


def by_smallest(scores):
    values, indices = scores.kthvalue(1, dim=-1, keepdim=True)
    return values, indices


def by_argmax(scores):
    indices = scores.argmax(-1, keepdim=True)
    return scores.gather(-1, indices), indices


WAYS = (by_topk, by_sort, by_largest, by_smallest, by_argmax)


class Routed(nn.Module):
    """Experts by close scores, whose order is another one in backward, as a kernel's might be."""

    def __init__(self, choose=by_topk, dropout=0.0):
        super().__init__()
        self.choose = choose
        self.router = nn.Linear(WIDTH, EXPERTS)
        nn.init.zeros_(self.router.weight)
        nn.init.ones_(self.router.bias)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.drop = nn.Dropout(dropout)
        self.register_buffer("rounding", 2e-7 * torch.arange(EXPERTS), persistent=False)

    def forward(self, x):
        is_backward = torch._C._current_graph_task_id() != -1
        rounding = self.rounding.flip(0) if is_backward else self.rounding
        gates, chosen = self.choose(self.router(x) + rounding)
        asked = torch.stack([torch.tanh(expert(x)) for expert in self.experts], 1)
        found = asked.take_along_dim(chosen.unsqueeze(-1), dim=1)
        return x + self.drop((found * gates.unsqueeze(-1)).sum(1))


class Drawn(Routed):
    """An expert drawn by its probability, then dropout."""

    def forward(self, x):
        probability = self.router(x).softmax(-1)
        chosen = torch.multinomial(probability, 1)
        asked = torch.stack([torch.tanh(expert(x)) for expert in self.experts], 1)
        found = asked.take_along_dim(chosen.unsqueeze(-1), dim=1)[:, 0]
        return x + self.drop(found * probability.gather(1, chosen))


def made(block, count=2):
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(block() for _ in range(count))), torch.randn(24, WIDTH)
    plan = plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None)
    assert all(region.keeps_choices for region in plan.regions)
    return model, batch, plan


def gradients(model, batch, *, backwards=1):
    model.zero_grad()
    torch.manual_seed(3)
    loss = square_mean(model, batch)
    for last in range(1 - backwards, 1):
        loss.backward(retain_graph=last < 0)
    return [p.grad.clone() for p in model.parameters()]


def furthest(found, expected):
    """Return the largest difference, relative to the largest gradient of its parameter."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for a, b in zip(found, expected, strict=True)
    )


class Checkpointed(nn.Module):
    """Each block under torch's own checkpoint."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("choose", WAYS, ids=lambda way: way.__name__)
def test_experts_of_the_forward_get_the_gradients(choose):
    """Where torch's checkpoint gives them to others without an error."""
    model, batch, plan = made(lambda: Routed(choose))
    plain = gradients(model, batch)
    assert furthest(gradients(Checkpointed(model), batch), plain) > 0.1
    with remat.apply(model, plan):
        assert furthest(gradients(model, batch), plain) < 1e-5
        twice = gradients(model, batch, backwards=2)
    assert furthest(twice, [2 * g for g in plain]) < 1e-5


def test_a_choice_that_is_drawn_moves_the_generator_as_before():
    """Same bits and same random state, dropout after it included."""
    model, batch, plan = made(lambda: Drawn(dropout=0.5))
    plain, state = gradients(model, batch), torch.get_rng_state()
    with remat.apply(model, plan):
        planned = gradients(model, batch)
    assert all(map(torch.equal, planned, plain))
    assert torch.equal(torch.get_rng_state(), state)


class WritesIndices(Routed):
    """Writes to the indices that it was given, and to the gates."""

    def forward(self, x):
        scores = torch.sigmoid(self.router(x))
        _, chosen = by_topk(scores.detach())
        chosen += 1
        chosen %= EXPERTS
        gates = scores.gather(-1, chosen)
        gates /= gates.sum(-1, keepdim=True)
        asked = torch.stack([torch.tanh(expert(x)) for expert in self.experts], 1)
        found = asked.take_along_dim(chosen.unsqueeze(-1), dim=1)
        return x + (found * gates.unsqueeze(-1)).sum(1)


def test_indices_that_are_written_to_are_kept_as_they_were_chosen():
    """As routers normalize their gates in place."""
    model, batch, plan = made(WritesIndices)
    plain = gradients(model, batch)
    with remat.apply(model, plan):
        assert all(map(torch.equal, gradients(model, batch, backwards=1), plain))


def test_region_in_a_region_chooses_the_same():
    """Also where what runs again holds regions of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(Routed(), Routed()) for _ in range(2)))
    batch = torch.randn(24, WIDTH)
    plan = plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None)
    (first, *_) = plan.regions
    outer = first.model_copy(update={"module": "0"})
    inner = [first.model_copy(update={"module": f"0.{i}", "is_nested": True}) for i in range(2)]
    plain = gradients(model, batch)
    with remat.apply(model, plan.model_copy(update={"regions": (outer, *inner)})):
        assert furthest(gradients(model, batch), plain) < 1e-5


def test_slices_of_the_batch_choose_the_same():
    """Each slice keeps its own choices."""
    model, batch, _ = made(Routed)
    plain = gradients(model, batch)
    fit = Fit(model, batch, loss=square_mean, optimizer=None)
    rewrites = sliced_blocks(fit.plain, Step(model, batch, square_mean, None))
    assert [rewrite.keeps_choices for rewrite in rewrites] == [True, True]
    install(model, (), rewrites)
    assert furthest(gradients(model, batch), plain) < 1e-5
    remove(model)


def test_what_is_kept_is_in_the_predicted_peak():
    """Indices as large as the activations: the prediction is what the simulation finds."""

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

        def forward(self, x):
            order = self.one(x).sort(-1).indices
            return x + self.two(torch.tanh(self.one(x)).gather(-1, order))

    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Sorted() for _ in range(6))), torch.randn(512, WIDTH)
    plan = plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None)
    kept = 6 * 512 * 8 * WIDTH * 8  # bytes of the indices of every block
    assert plan.predicted_peak_bytes > kept
    simulation = remat.simulate(model, batch, plan, loss=square_mean, optimizer=None)
    assert simulation.peak_bytes == plan.predicted_peak_bytes

    def measured(plan):
        with remat.apply(model, plan):
            found = remat.measure(model, batch, loss=square_mean, optimizer=None, steps=1)
        return found.peak_bytes

    forgetful = [r.model_copy(update={"keeps_choices": False}) for r in plan.regions]
    without = plan.model_copy(update={"regions": tuple(forgetful)})
    assert measured(plan) - measured(without) == kept


def test_no_choice_is_dropped_by_itself():
    """At every budget, ops that choose are none of those that are made again one by one."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Routed() for _ in range(4))), torch.randn(512, WIDTH)
    fit = Fit(model, batch, loss=square_mean, optimizer=None, chunks=False)
    plans = fit.frontier(points=6)
    dropped = {op.name for plan in plans for region in plan.regions for op in region.dropped_ops}
    assert dropped
    assert not {name for name in dropped if "topk" in name}


def test_check_tells_where_checkpointing_chooses_again():
    """A note, not an error: on a CPU kernels repeat."""
    model, batch, _ = made(Routed)
    for block in model:
        block.rounding.zero_()
    report = remat.check(Checkpointed(model), batch, loss=square_mean)
    (routing,) = (h for h in report.hazards if h.code == "routing")
    assert routing.severity is Severity.NOTE
    assert "topk" in routing.message
    assert report.identical


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiled_step_chooses_as_its_forward_did():
    """The region runs eagerly inside of what is compiled."""
    model, batch, plan = made(Routed)
    plain = gradients(model, batch)
    torch._dynamo.reset()
    with remat.apply(model, plan):
        compiled = torch.compile(model, backend="aot_eager")
        assert furthest(gradients(compiled, batch), plain) < 1e-5
    torch._dynamo.reset()
