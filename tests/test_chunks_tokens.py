"""Token-wise modules in slices of the tokens: found by their ops, exact bytes, honest bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import remat
from benchmarks import shapes
from remat.fit import Fit
from remat.planner.records import RewriteKind
from remat.regions.apply import install, is_applied, remove
from remat.rewriting.tokens import sliced_tokens
from tests.models import square_mean

CRUMBS = 4096
WIDTH = 16


class Mlp(nn.Module):
    """An MLP whose wide rows go through `change`, which is given the module as well."""

    def __init__(self, change=None, *, wide=8):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, wide * WIDTH), nn.Linear(wide * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.randn(wide * WIDTH))
        self.register_buffer("places", torch.randn(64, 1))
        self.change = change or (lambda y, _module: y)

    def forward(self, x):
        return self.down(self.change(F.gelu(self.up(x)), self))


def gated(y, _):
    """Halves of the last dimension, one gating the other, beside what they came from."""
    gate, value = y.chunk(2, dim=-1)
    return torch.cat([F.silu(gate) * value, value], dim=-1)


def written(y, _):
    """In place, on what was made inside."""
    return (y * 2).add_(1).relu_()


def rms(y, module):
    """A norm by hand over the last dimension, scaled by a parameter."""
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * (1 + module.scale)


TOKEN_WISE = {
    "plain": None,
    "gated": gated,
    "in place": written,
    "RMS": rms,
    "RMS of torch": lambda y, m: F.rms_norm(y, y.shape[-1:], m.scale),
    "layer norm": lambda y, m: F.layer_norm(y, y.shape[-1:], m.scale),
    "softmax of features": lambda y, _: y.softmax(-1),
    "with itself": lambda y, _: y * y,
}
MIXED = {
    "mean of tokens": lambda y, _: y - y.mean(1, keepdim=True),
    "mean of examples": lambda y, _: y - y.mean(0, keepdim=True),
    "softmax of tokens": lambda y, _: y.softmax(1),
    "turned": lambda y, _: y + y.flip(1),
    "shifted": lambda y, _: y + y.roll(1, 0),
    "summed up": lambda y, _: y.cumsum(1),
    "attention": lambda y, _: y @ y.transpose(1, 2) @ y / 100,
    "swapped": lambda y, _: y + y.transpose(0, 1),
    "by its place": lambda y, m: y + m.places,
    "dropout": lambda y, _: F.dropout(y, 0.1),
    "crossed": lambda y, _: y + (y[:, :1] + y.flatten(0, 1)[:64]).mean(0, keepdim=True),
    "first of all": lambda y, _: y + y[:1, :1],
}


def weighed(y, _):
    """The gradient is divided by the norm of all of it."""
    y = y * 1.0
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient / gradient.norm())
    return y


class _Averaged(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of rows."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / gradient[..., 0].numel()


# What a trace of the whole takes for token-wise: constants are made of the number of rows.
COUNTED = {
    "by their number": lambda y, _: y / y.shape[1],
    "a branch on their number": lambda y, _: y.relu() if y.shape[1] < 100 else y.tanh(),
    "a table of their number": lambda y, _: y + torch.full((y.shape[-1],), float(y.shape[1])),
    "a gradient by their number": lambda y, _: _Averaged.apply(y),
}


def rows(dtype=torch.float32):
    """64 examples of 64 tokens: as many, so that dimensions can be taken for one another."""
    return torch.randn(64, 64, WIDTH, dtype=dtype)


def sliced(model, batch, loss=square_mean):
    """The rewrites of a model's token-wise modules."""
    plain = Fit(model, batch, loss=loss, optimizer=None).plain
    return sliced_tokens(plain, model, ())


def step(model, batch):
    """The loss and every gradient."""
    model.zero_grad(set_to_none=True)
    loss = square_mean(model, batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_token_wise_modules_are_found_and_run_in_slices(name):
    """By their ops alone; in float64 loss and gradients are those of the whole, at any shape."""
    model = nn.Sequential(Mlp(TOKEN_WISE[name])).double()
    (rewrite,) = sliced(model, rows(torch.float64))
    assert (rewrite.module, rewrite.num_slices) == ("0", 8)
    for batch in (
        rows(torch.float64),
        rows(torch.float64)[:3, :5].contiguous(),
        rows()[0].double(),
    ):
        plain = step(model, batch)
        install(model, (), (rewrite,))
        for one, other in zip(plain, step(model, batch), strict=True):
            assert (one - other).abs().max() <= 1e-12 * one.abs().max()
        remove(model)
        assert not is_applied(model)


@pytest.mark.parametrize("name", MIXED)
def test_modules_that_mix_tokens_are_left_whole(name):
    """Whatever reads another token, or a token's place, or draws, is no token-wise module."""
    assert sliced(nn.Sequential(Mlp(MIXED[name])), rows()) == ()


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modules_that_count_their_rows_are_left_whole(name, device):
    """Slices have fewer rows: other constants, other ops or another gradient, seen on fakes."""
    model = nn.Sequential(Mlp(COUNTED[name])).to(device)
    assert sliced(model, rows().to(device)) == ()


def test_modules_whose_gradient_depends_on_other_rows_are_left_whole():
    """Seen where the module is tried on real numbers."""
    assert sliced(nn.Sequential(Mlp(weighed)), rows()) == ()


def test_narrow_few_and_shared_modules():
    """Nothing wide, or under 128 rows: no slices; a module that is called twice has one rewrite."""
    assert sliced(nn.Sequential(Mlp(wide=1)), rows()) == ()
    assert sliced(nn.Sequential(Mlp()), rows()[:1, :32]) == ()
    shared = Mlp()
    (rewrite,) = sliced(nn.Sequential(shared, nn.Tanh(), shared), rows())
    assert rewrite.module == "0"


def stack(count=3, wide=8):
    """MLPs with residual-free mixing between them, so that each block is no token-wise module."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(WIDTH), Mlp(wide=wide)

        def forward(self, x):
            y = self.norm(x)
            return x + self.mlp(y - y.mean(1, keepdim=True))

    return nn.Sequential(*(Block() for _ in range(count)))


@pytest.mark.slow
def test_regions_around_slices_are_predicted_to_the_byte():
    """Any regions beside and around sliced modules: timeline, simulation and measurement agree."""
    model, batch = stack(2), rows()
    fit = Fit(model, batch, loss=square_mean, optimizer=None, chunks=True)
    (program,) = fit.narrowed
    around = [p for p, o in enumerate(program.options) if o.module in ("0", "1")]
    assert around
    for seed in range(3):
        chosen: list[int] = []
        places = torch.randperm(
            len(program.options), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        for position in [*around[seed : seed + 1], *places]:
            option = program.options[position]
            if not any(option.excludes(program.options[p]) for p in chosen):
                chosen.append(position)
        curve, simulated = program.timeline.curve(chosen), program.simulate(chosen)
        assert abs(curve.peak_bytes - simulated.peak_bytes) <= CRUMBS
    plan = fit.plan("1000%").model_copy(
        update={
            "regions": program.regions(chosen),
            "rewrites": program.rewrites,
            "predicted_peak_bytes": simulated.peak_bytes,
            "budget_bytes": simulated.peak_bytes + CRUMBS,
        }
    )
    proof = remat.verify(model, batch, plan, loss=square_mean, optimizer=None)
    assert proof.passed, proof.differences[:3]
    assert abs(proof.measured_peak_bytes - simulated.peak_bytes) <= CRUMBS


def hand_made():
    """The stack as a case."""
    return shapes.Case(stack(2), rows(), square_mean)


def gpt2(dropout=0.0):
    """GPT-2 with few words, so that its MLPs are what is large."""
    return shapes.gpt2(
        layers=2, width=64, heads=2, vocabulary=300, batch=4, tokens=128, dropout=dropout
    )


def llama():
    """Llama, gated and without biases."""
    return shapes.llama(
        layers=1, width=64, inner=172, heads=4, key_value_heads=2, vocabulary=300, batch=4,
        tokens=128, dropout=0.0,
    )  # fmt: skip


CASES = {"by hand": hand_made, "gpt2": gpt2, "llama": llama}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_slices_of_tokens_reach_below_everything_before(name):
    """Below regions and sliced heads: the peak as predicted, and only named gradients differ."""
    case = CASES[name]()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=None)
    *before, needed = (
        p.needed(p.least_peak()[1]) for p in (fit.plain, *fit.rewritten, *fit.narrowed)
    )
    assert needed < 0.95 * min(before)
    low = fit.plan(needed)
    found = [r for r in low.rewrites if r.kind is RewriteKind.SLICED_TOKENS]
    assert len(found) == len({r.module for r in found}) >= 1
    before = [dict(m.__dict__) for m in case.model.modules()]
    proof = remat.verify(case.model, case.batch, low, loss=case.loss, optimizer=None)
    assert proof.passed, proof.differences[:3]
    assert abs(proof.measured_peak_bytes - low.predicted_peak_bytes) <= CRUMBS
    assert [dict(m.__dict__) for m in case.model.modules()] == before
    named = {f"gradient of {n}" for r in low.rewrites for n in r.affects}
    assert {d.name for d in proof.differences if d.name.startswith("gradient of")} <= named


def test_only_the_sums_of_a_module_are_named_where_its_rows_are_exact():
    """Tried on random rows: outputs and gradients of the input are the same bits, sums are not."""
    model, batch = stack(), rows()
    rewrites = sliced(model, batch)
    plain = step(model, batch)
    install(model, (), rewrites)
    other = step(model, batch)
    remove(model)
    names = ["loss", *(n for n, p in model.named_parameters() if p.grad is not None)]
    differing = {
        n for n, a, b in zip(names, plain, other, strict=True) if not torch.equal(a, b)
    }  # fmt: skip
    assert differing <= {n for r in rewrites for n in r.affects}
    if all(set(r.affects) <= {n for n in names if n.startswith(r.module)} for r in rewrites):
        assert "loss" not in differing
    meta = sliced(copy.deepcopy(model).to("meta"), batch.to("meta"))
    assert set(meta[0].affects) == {n for n, _ in model.named_parameters()}


@pytest.mark.slow
def test_slices_come_where_they_must_or_where_asked_for():
    """`None` below the reach of everything else, `True` where cheaper, `False` never."""
    case = hand_made()
    fits = {c: Fit(case.model, case.batch, loss=case.loss, optimizer=None, chunks=c)
            for c in (None, True, False)}  # fmt: skip
    assert fits[False].narrowed == ()
    least = fits[None].plain.needed(fits[None].plain.least_peak()[1])
    (program,) = fits[None].narrowed
    below = program.needed(program.least_peak()[1])
    assert below < least
    assert fits[None].plan(least).rewrites == ()
    assert fits[None].plan(below).rewrites
    costs = {}
    for chunks in (None, True):
        plan = fits[chunks].plan(least)
        costs[chunks] = plan.recompute_seconds + sum(r.added_seconds for r in plan.rewrites)
    assert costs[True] <= costs[None]
    with pytest.raises(remat.BudgetError):
        fits[False].plan(below)


def test_dropout_is_not_sliced():
    """In slices it would draw in another order."""
    case = gpt2(dropout=0.1)
    assert sliced(case.model, case.batch, case.loss) == ()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_slices_and_graphs_are_read_again(again):
    """A copy runs in slices; retained graphs and gradients of gradients are right in them."""
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH)).double()
    model, batch = nn.Sequential(model, nn.Tanh()), rows(torch.float64)

    def second_order(model):
        loss = square_mean(model, batch)
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        model.zero_grad()
        sum(g.square().sum() for g in first).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected, plain = second_order(model), step(model, batch)
    rewrites = sliced(model, batch)
    assert rewrites
    install(model, (), rewrites)
    other = again(model)
    remove(model)
    assert is_applied(other)
    for found, wanted in ((second_order(other), expected), (step(other, batch), plain)):
        for one, two in zip(found, wanted, strict=True):
            assert (one - two).abs().max() <= 1e-12 * two.abs().max()
    remove(other)
    assert not is_applied(other)


@pytest.mark.slow
def test_autocast_plan_is_exact_and_passes():
    """Under autocast to bfloat16 the tolerance is that type's, and the peak as predicted."""
    case = hand_made()

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().square().mean()

    fit = Fit(case.model, case.batch, loss=loss, optimizer=None, chunks=True)
    plan = fit.plan(fit.narrowed[0].keep_all_peak_bytes)
    assert plan.rewrites[0].tolerance > 2**-8
    proof = remat.verify(case.model, case.batch, plan, loss=loss, optimizer=None)
    assert proof.passed, proof.differences[:3]
    assert plan.predicted_peak_bytes == pytest.approx(proof.measured_peak_bytes, rel=0.01)


def test_plan_says_what_runs_in_slices_and_how_far_off_it_is():
    """The file gives the plan back; words name modules, tokens, parameters and a bound."""
    case = hand_made()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=None, chunks=True)
    plan = fit.plan(fit.narrowed[0].keep_all_peak_bytes)
    assert remat.Plan.model_validate_json(plan.model_dump_json()) == plan
    (note,) = [n for n in plan.notes if "Bit identity" in n]
    assert "0.mlp, 1.mlp (by the tokens)" in note
    assert "0.mlp.up.weight" in note
    assert "slices of the tokens" in " ".join(str(plan).split())
