"""Blocks in slices of the batch: the last resort below every other plan, or refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import remat
from remat.fit import Fit
from remat.planner.records import RewriteKind
from remat.program import Step
from remat.regions.apply import install, is_applied, remove
from remat.rewriting.calls import sliced_blocks
from tests.models import least_of, square_mean, tightest

CRUMBS = 4096


class Block(nn.Module):
    """Attention-like mixing of tokens, and an MLP; `mix` and `noise` are what cannot be sliced."""

    def __init__(self, width=16, mix=None, noise=0.0):
        super().__init__()
        self.mix = mix or (lambda x: x)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(8 * width, width)
        self.drop = nn.Dropout(noise)

    def forward(self, x, scale=1.0):
        y = self.norm(x) @ x.transpose(1, 2) @ x / 100
        return x + self.drop(self.down(torch.tanh(self.up(self.mix(y))))) * scale


def stack(dtype=torch.float32, **options):
    return nn.Sequential(*(Block(**options) for _ in range(3))).to(dtype)


def step(model, batch):
    model.zero_grad(set_to_none=True)
    loss = square_mean(model, batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.fixture
def batch():
    return torch.randn(8, 12, 16)


def last_resort(model, batch, **options):
    fit = Fit(model, batch, loss=square_mean, optimizer=None, **options)
    return fit.last_resort


def rewrites_of(model, batch):
    """The blocks of a model that can be sliced, without a search."""
    fit = Fit(model, batch, loss=square_mean, optimizer=None)
    return sliced_blocks(fit.plain, Step(model, batch, square_mean, None))


def sliced_plan(model, batch):
    """The plan of the least peak of all, which must be one in slices of the batch."""
    plan = least_of(Fit(model, batch, loss=square_mean, optimizer=None))
    assert {r.kind for r in plan.rewrites} == {RewriteKind.SLICED_CALL}
    return plan


@pytest.mark.slow
def test_slices_of_the_batch_reach_below_regions(batch):
    """Peak below that of every region, as predicted, and only rounding differs."""
    model = stack()
    alone = tightest(model, batch, loss=square_mean, optimizer=None)
    plan = sliced_plan(model, batch)
    assert [r.module for r in plan.rewrites] == ["0", "1", "2"]
    assert plan.budget_bytes < 0.8 * alone.budget_bytes
    before = [dict(m.__dict__) for m in model.modules()]
    proof = remat.verify(model, batch, plan, loss=square_mean, optimizer=None)
    assert proof.passed, proof.differences[:3]
    assert proof.identical or proof.within_rounding
    assert abs(proof.measured_peak_bytes - plan.predicted_peak_bytes) <= CRUMBS
    assert [dict(m.__dict__) for m in model.modules()] == before


@pytest.mark.parametrize("size", [8, 5, 1])
def test_gradients_are_the_plain_ones_at_any_batch(size):
    """Float64 gradients equal to 1e-12, also where the batch is smaller, or one example."""
    model = stack(torch.float64)
    rewrites = rewrites_of(model, torch.randn(8, 12, 16, dtype=torch.float64))
    assert len(rewrites) == 3
    batch = torch.randn(size, 12, 16, dtype=torch.float64)
    plain = step(model, batch)
    install(model, (), rewrites)
    for one, other in zip(plain, step(model, batch), strict=True):
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()
    remove(model)
    assert not is_applied(model)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_keep_the_slices(batch, again):
    """A deep or pickled copy runs its own blocks in slices, and is freed of them."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16),
                            nn.Tanh(), nn.LayerNorm(16)) for _ in range(3)))  # fmt: skip
    plain = step(model, batch)
    install(model, (), rewrites_of(model, batch))
    other = again(model)
    remove(model)
    assert is_applied(other)
    for one, two in zip(plain, step(other, batch), strict=True):
        assert (one - two).abs().max() <= 1e-5 * one.abs().max()
    assert next(model.parameters()).grad is not next(other.parameters()).grad
    remove(other)
    assert not is_applied(other)


def centred(x):
    return x - x.mean(dim=0, keepdim=True)


def first_only(x):
    return x + x[:1]


def doubled(x):
    return torch.cat([x, x])[: len(x)].roll(1, 0)


def weighed(x):
    """As it is, with a gradient that is divided by the norm of all of it."""
    x = x * 1.0
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient / gradient.norm())
    return x


@pytest.mark.parametrize("mix", [centred, first_only, doubled, weighed])
def test_blocks_that_mix_examples_are_not_sliced(batch, mix):
    """A block in which one example sees another, or its gradient, is found out by running it."""
    assert last_resort(stack(mix=mix), batch) == ()


def test_random_numbers_and_batch_statistics_are_not_sliced(batch):
    """Dropout would draw in another order, BatchNorm would see other batches: refused."""
    assert last_resort(stack(noise=0.1), batch) == ()
    normed = nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(12), nn.Linear(64, 16), nn.Tanh())
          for _ in range(3))
    )  # fmt: skip
    assert last_resort(normed, batch) == ()


def test_slices_are_never_forced(batch):
    """One example, no values, or `chunks=False`: no slices of the batch."""
    assert last_resort(stack(), batch[:1]) == ()
    assert last_resort(stack().to("meta"), batch.to("meta")) == ()
    assert last_resort(stack(), batch, chunks=False) == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_transformers_blocks_are_sliced_with_their_heads(name):
    """Libraries' blocks (masks, positions, caches off) pass verify at the least peak of all."""
    from tests.zoo import TINY

    case = TINY[name].build()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=None)
    (program,) = fit.last_resort
    plan = fit.plan(program.needed(program.least_peak()[1]))
    assert any(r.kind is RewriteKind.SLICED_CALL for r in plan.rewrites)
    proof = remat.verify(case.model, case.batch, plan, loss=case.loss, optimizer=None)
    assert proof.passed, proof.differences[:3]
    assert abs(proof.measured_peak_bytes - plan.predicted_peak_bytes) <= CRUMBS


def test_hooks_see_whole_batches_outside_of_slices(batch):
    """A hook on a sliced block fires once with all of the batch; inside, once for each slice."""
    model = stack()
    install(model, (), rewrites_of(model, batch))
    seen = {"block": [], "inner": []}
    model[0].register_forward_hook(lambda _m, _a, out: seen["block"].append(len(out)))
    model[0].up.register_forward_hook(lambda _m, _a, out: seen["inner"].append(len(out)))
    step(model, batch)
    assert seen == {"block": [8], "inner": [1] * 8}
