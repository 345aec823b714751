"""Verify can fail: planted errors turn it red, hazards are refused or handled and stay green."""

from __future__ import annotations

import copy
import gc
import os
import random
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from remat.regions import runtime
from remat.regions.runtime import is_recomputing
from remat.trace.standin import attribute_tensors
from tests.models import Block, square_mean, tightest

CRUMBS = 4096
STEP = {"loss": square_mean}


def stack(make, count=3):
    return nn.Sequential(*(make() for _ in range(count)))


def with_regions(plan, **fields):
    """The plan with fields of every region changed."""
    return plan.model_copy(
        update={"regions": tuple(r.model_copy(update=fields) for r in plan.regions)}
    )


def all_blocks(model, batch):
    made = plan_policy(model, batch, AllBlocks(), **STEP)
    assert len(made.regions) == len(model)
    return made


@pytest.fixture
def batch():
    return torch.randn(64, 16)


# -- planted errors -------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Multiplies by another factor when it is run again."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.linear, self.out, self.factor = nn.Linear(16, 16), nn.Linear(16, 16), factor
        # A buffer that is updated makes the runtime mark the recomputation.
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        y = self.norm(self.linear(x))
        y = y * (self.factor if is_recomputing() else 1.0)
        return x + self.out(torch.tanh(y))


def test_scaled_gradient_is_seen(batch):
    """A recomputation that is off by a thousandth: the gradients it feeds are named, no others."""
    model = stack(lambda: Scaled(1.001))
    proof = remat.verify(model, batch, all_blocks(model, batch), **STEP)
    assert not proof.passed
    assert not proof.identical
    assert not proof.within_noise
    names = {d.name for d in proof.differences}
    assert "gradient of 2.out.weight" in names
    assert "gradient of 2.out.bias" not in names  # it is not computed from what was recomputed
    assert "loss" not in names
    worst = max(d.max_rel for d in proof.differences if d.name.startswith("gradient of 2.out"))
    assert 1e-5 < worst < 1e-2
    honest = stack(lambda: Scaled(1.0))
    assert remat.verify(honest, batch, all_blocks(honest, batch), **STEP).identical


def test_single_wrong_bit_is_seen(batch):
    """One value of one gradient, one unit in the last place off, is a difference."""
    model = stack(lambda: Block(16))
    made = all_blocks(model, batch)

    def hook(gradient):
        wrong = gradient.clone()
        if runtime_is_planned(model):
            wrong.view(torch.int32)[0, 0] += 1
        return wrong

    model[1].body[0].weight.register_hook(hook)
    proof = remat.verify(model, batch, made, loss=square_mean, optimizer=None)
    assert [d.name for d in proof.differences] == ["gradient of 1.body.0.weight"]
    assert not proof.passed


def runtime_is_planned(model):
    return any("forward" in m.__dict__ for m in model.modules())


def test_redrawn_dropout_is_seen(batch):
    """Without the saved random state, dropout is drawn anew: gradients and random state differ."""
    model = stack(lambda: Block(16, dropout=0.5))
    made = all_blocks(model, batch)
    assert all(r.draws_random_numbers for r in made.regions)
    assert remat.verify(model, batch, made, **STEP).identical
    proof = remat.verify(model, batch, with_regions(made, draws_random_numbers=False), **STEP)
    assert not proof.passed
    names = {d.name for d in proof.differences}
    assert "random state of torch" in names
    assert any(n.startswith("gradient of") for n in names)


def test_buffer_updated_twice_is_seen(batch):
    """Without the snapshot of buffers, batch norm counts twice: each of its buffers is named."""
    model = stack(lambda: Block(16, norm=nn.BatchNorm1d(16), dropout=0.0))
    made = all_blocks(model, batch)
    assert all(len(r.mutated_buffers) == 3 for r in made.regions)
    assert remat.verify(model, batch, made, **STEP).identical
    proof = remat.verify(model, batch, with_regions(made, mutated_buffers=()), **STEP)
    assert not proof.passed
    names = {d.name for d in proof.differences}
    assert "buffer 0.norm.num_batches_tracked" in names
    assert "buffer 2.norm.running_mean" in names


def test_hook_that_fires_twice_is_seen(batch, monkeypatch):
    """If hooks inside regions were not silenced, their second calls are counted and named."""
    model = stack(lambda: Block(16))
    made = all_blocks(model, batch)
    assert remat.verify(model, batch, made, **STEP).identical
    monkeypatch.setattr(runtime, "_hook_tables", lambda module, run: [])
    proof = remat.verify(model, batch, made, **STEP)
    assert not proof.passed
    noted = {d.name: d.note for d in proof.differences}
    assert noted["forward hook calls of 0.body"] == "1 before, 2 now"


def test_peak_above_the_budget_is_seen(batch):
    """A plan whose budget is below the measured peak does not pass, though the bits are right."""
    model = stack(lambda: Block(16))
    made = all_blocks(model, batch)
    proof = remat.verify(model, batch, made, **STEP)
    assert proof.passed
    low = made.model_copy(update={"budget_bytes": proof.measured_peak_bytes - 1})
    proof = remat.verify(model, batch, low, **STEP)
    assert proof.identical
    assert not proof.within_budget
    assert not proof.passed


def test_changed_training_flag_is_seen(batch):
    """A module that a recomputation leaves in another mode is named."""

    class Flips(Scaled):
        def forward(self, x):
            if is_recomputing():
                self.linear.training = False
            return super().forward(x)

    model = stack(Flips)
    proof = remat.verify(model, batch, all_blocks(model, batch), **STEP)
    assert not proof.passed
    assert "training flag of 0.linear" in {d.name for d in proof.differences}
    assert model[0].linear.training


def test_planned_step_that_fails_is_an_error(batch):
    """A step that only fails under the plan is no difference but an error that says so."""

    class Fails(Scaled):
        def forward(self, x):
            if is_recomputing():
                raise KeyError("only when run again")
            return super().forward(x)

    model = stack(Fails)
    made = all_blocks(stack(Scaled), batch)  # of the same names and shapes
    with pytest.raises(remat.VerificationError, match="only when run again"):
        remat.verify(model, batch, made, **STEP)
    assert not runtime_is_planned(model)
    assert all(p.grad is None for p in model.parameters())


# -- models that do not repeat themselves ---------------------------------------------------------


class Noisy(nn.Module):
    """Adds noise that no seed controls, then blocks that may be scaled when run again."""

    def __init__(self, noise, factor):
        super().__init__()
        self.noise = noise
        self.blocks = stack(lambda: Scaled(factor))

    def forward(self, x):
        numbers = np.frombuffer(os.urandom(x.shape[1]), dtype=np.uint8)
        return self.blocks(x + self.noise * torch.tensor(numbers.astype(np.float32)) / 255)


@pytest.mark.parametrize(
    ("noise", "factor", "passes"), [(1e-2, 1.0, True), (1e-4, 3.0, False), (0.0, 1.0, True)]
)
def test_noise_of_the_model_is_allowed_and_no_more(batch, noise, factor, passes):
    """Differences within the model's own pass as such; a planted larger one does not."""
    model = Noisy(noise, factor)
    made = plan_policy(model, batch, AllBlocks(), **STEP)
    assert made.regions
    proof = remat.verify(model, batch, made, **STEP)
    assert proof.passed == passes
    assert proof.identical == (noise == 0)
    assert proof.within_noise == (passes and noise > 0)
    assert bool(proof.noise) == (noise > 0)
    if noise:
        assert any("differs from itself" in note for note in proof.notes)


@pytest.mark.slow
def test_noise_is_not_taken_for_an_error_by_chance():
    """Of forty tensors one exceeds the noise of a few repeats now and then, but not every time."""
    batch = torch.randn(8, 16)
    for seed in range(25):
        torch.manual_seed(seed)
        model = Noisy(1e-2, 1.0)
        made = plan_policy(model, batch, AllBlocks(), **STEP)
        assert remat.verify(model, batch, made, **STEP).within_noise


def test_planted_error_in_a_reproducible_part_is_not_noise(batch):
    """Noise in one part of a model excuses nothing in a part that repeats itself exactly."""

    class TwoParts(nn.Module):
        def __init__(self):
            super().__init__()
            self.noisy, self.exact = Noisy(0.1, 1.0), stack(lambda: Scaled(1.01))

        def forward(self, x):
            return torch.cat([self.noisy(x), self.exact(x)])

    model = TwoParts()
    made = remat.plan(model, batch, "1000%", **STEP)
    region = plan_policy(model.exact, batch, AllBlocks(), **STEP).regions[0]
    region = region.model_copy(
        update={
            "module": "exact.0",
            "mutated_buffers": tuple(f"exact.{b}" for b in region.mutated_buffers),
        }
    )
    proof = remat.verify(model, batch, made.model_copy(update={"regions": (region,)}), **STEP)
    assert not proof.passed
    assert not proof.within_noise
    noisy = {n.name for n in proof.noise}
    assert any(d.name not in noisy for d in proof.differences)


# -- hazards --------------------------------------------------------------------------------------


class RandomReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(16, 16), nn.RReLU()

    def forward(self, x):
        return x + self.relu(self.linear(x))


class DrawsElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(16)

    def forward(self, x):
        scale = random.random() + float(np.random.rand())  # noqa: NPY002  as users draw
        return self.block(torch.tanh(x) * scale)


class DrawsFromNumpyTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(16)

    def forward(self, x):
        drawn = np.random.rand(16).astype("float32")  # noqa: NPY002
        return self.block(torch.tanh(x) * torch.from_numpy(drawn))


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(16)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        return self.block(torch.tanh(x) * torch.rand(16, generator=self.generator))


class WritesToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return x.add_(torch.tanh(self.linear(2 * x)))


class WritesToItsOutputLater(nn.Module):
    """What a block has read, and autograd has not kept, is written to after it."""

    class Reads(nn.Module):
        """Reads its input without saving it."""

        def __init__(self):
            super().__init__()
            self.block = Block(16)

        def forward(self, x):
            return self.block(x + 1)

    def __init__(self):
        super().__init__()
        self.one, self.two = Block(16), self.Reads()

    def forward(self, x):
        kept = self.one(x) * 1
        y = self.two(kept)
        kept.detach().mul_(3)
        return y


class ScalesItsWeight(nn.Module):
    """Its parameter is written to between forward and backward."""

    def __init__(self):
        super().__init__()
        self.block = Block(16)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        y = torch.tanh(self.block(x) + self.scale.sum())
        with torch.no_grad():
            self.scale.mul_(0.5)
        return x + y


class Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("average", torch.zeros(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = torch.tanh(self.linear(x) - self.average)
        with torch.no_grad():
            self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
            self.steps += 1
        return x + y * y


class ReplacedBuffer(nn.Module):
    """The average is a new tensor each time."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("average", torch.zeros(16))

    def forward(self, x):
        y = torch.tanh(self.linear(x) - self.average)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        return x + y * y


class Spectral(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.up, self.down = norm(nn.Linear(16, 64)), norm(nn.Linear(64, 16))

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Cached(nn.Module):
    """Appends to a list and attends to all of it; the model clears it when a step begins."""

    def __init__(self):
        super().__init__()
        self.linear, self.cache = nn.Linear(16, 16), []

    def forward(self, x):
        y = torch.tanh(self.linear(x))
        self.cache.append(y)
        return x + torch.stack(self.cache).sum(0).sigmoid() * y


class ClearsCaches(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = stack(Cached)

    def forward(self, x):
        for block in self.blocks:
            block.cache.clear()
        return self.blocks(x)


class Remembers(nn.Module):
    """Reads what it left in its last call."""

    def __init__(self):
        super().__init__()
        self.linear, self.state, self.calls = nn.Linear(16, 16), torch.zeros(64, 16), 0

    def forward(self, x):
        y = torch.tanh(self.linear(x)) * self.state.sigmoid()
        self.state = y.detach()
        self.calls += 1
        return x + y


class HandCheckpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.after, self.reentrant = Block(16), Block(16), reentrant

    def forward(self, x):
        return self.after(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class Passes(nn.Module):
    """Passes a dict that each block changes."""

    class Inner(nn.Module):
        """Reads the dict and adds to it."""

        def __init__(self):
            super().__init__()
            self.block = Block(16)

        def forward(self, x, shared):
            y = torch.tanh(self.block(x)) + sum(shared.values(), torch.zeros(()))
            shared[len(shared)] = y.mean()
            return y * y

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Inner() for _ in range(3))

    def forward(self, x):
        shared = {}
        for block in self.blocks:
            x = block(x, shared)
        return x


def chained(make):
    """A linear layer first: the batch itself is not to be written over."""
    return lambda: nn.Sequential(nn.Linear(16, 16), *(make() for _ in range(3)))


def batch_norms():
    return stack(lambda: Block(16, norm=nn.BatchNorm1d(16, momentum=None)))


def evaluated():
    return stack(lambda: Block(16, norm=nn.BatchNorm1d(16))).eval()


REFUSED = {
    "rrelu": (chained(RandomReLU), "RReLU"),
    "own generator": (chained(OwnGenerator), "generator of its own"),
    "input": (chained(WritesToItsInput), "writes to its own input"),
    "input later": (chained(WritesToItsOutputLater), "written to later"),
    "parameter": (chained(ScalesItsWeight), "outside that is no buffer"),
    "cache": (ClearsCaches, "attribute 'cache'"),
    "state": (chained(Remembers), "attribute '(state|calls)'"),
    "dict": (Passes, "argument 1"),
    "replaced buffer": (chained(ReplacedBuffer), "buffer 'average'"),
}
HANDLED = {
    "python and numpy": chained(DrawsElsewhere),
    "numpy tensor": chained(DrawsFromNumpyTensor),
    "ema": chained(Average),
    "spectral norm": lambda: stack(
        lambda: Spectral(nn.utils.parametrizations.spectral_norm)
    ),
    "batch norm without momentum": batch_norms,
    "eval with gradients": evaluated,
    "checkpointed": chained(lambda: HandCheckpointed(False)),
    "checkpointed, reentrant": chained(lambda: HandCheckpointed(True)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_hazards_are_refused_with_a_reason(name, batch):
    """What a recomputation would get wrong is kept, says why, and the tightest plan verifies."""
    build, reason = REFUSED[name]
    model = build()
    made = tightest(model, batch, **STEP)
    reasons = [h.message for h in made.hazards]
    assert any(re.search(reason, message) for message in reasons), reasons
    assert all(h.where for h in made.hazards)
    refused = {h.where for h in made.hazards}
    assert not refused & {r.module for r in made.regions}
    proof = remat.verify(model, batch, made, **STEP)
    assert proof.passed, proof.differences
    # Tensors in plain attributes are in the prediction, and not in what is measured.
    attributes = sum(t.nbytes for t in attribute_tensors(model))
    error = made.predicted_peak_bytes - proof.measured_peak_bytes
    assert -CRUMBS <= error <= CRUMBS + attributes


@pytest.mark.parametrize("name", HANDLED)
def test_hazards_are_handled(name, batch):
    """What can be recomputed right is, and verifies at the tightest plan and with every block."""
    model = HANDLED[name]()
    for made in (tightest(model, batch, **STEP), plan_policy(model, batch, AllBlocks(), **STEP)):
        proof = remat.verify(model, batch, made, **STEP)
        assert proof.identical, proof.differences
        assert proof.passed
        assert abs(made.predicted_peak_bytes - proof.measured_peak_bytes) <= CRUMBS


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_old_spectral_norm_is_handled(batch):
    """The hook-based spectral norm, whose weight is a plain attribute, verifies."""
    model = stack(lambda: Spectral(nn.utils.spectral_norm))
    made = tightest(model, batch, **STEP)
    proof = remat.verify(model, batch, made, **STEP)
    assert proof.identical, proof.differences
    assert proof.passed


def test_buffers_in_regions_follow_a_model_without_a_plan(batch):
    """Over five steps with the plan on, buffers and parameters stay those of the bare model."""
    for build in (chained(Average), batch_norms):
        bare = build()
        planned = copy.deepcopy(bare)
        made = plan_policy(planned, batch, AllBlocks(), **STEP)
        assert any(r.mutated_buffers for r in made.regions)
        with remat.apply(planned, made):
            for model in (bare, planned):
                torch.manual_seed(0)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                for _ in range(5):
                    optimizer.zero_grad()
                    square_mean(model, batch).backward()
                    optimizer.step()
        for (name, a), (_, b) in zip(
            bare.state_dict().items(), planned.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), name


def test_hooks_of_every_kind_fire_once_and_may_change_values(batch):
    """Pre-hooks, forward hooks with keywords and tensor hooks: same bits, same counts."""
    model = stack(lambda: Block(16))
    counts = []
    model[0].register_forward_pre_hook(lambda m, a: counts.append("pre"))
    model[0].body.register_forward_hook(lambda m, a, k, o: counts.append("kw"), with_kwargs=True)
    model[1].body[0].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    model[1].register_full_backward_hook(lambda m, i, o: counts.append("back"))
    model[2].body[2].weight.register_hook(lambda g: counts.append("grad") or g * 3)
    made = all_blocks(model, batch)
    counts.clear()
    with remat.apply(model, made):
        square_mean(model, batch).backward()
    assert sorted(counts) == ["back", "grad", "kw", "pre"]
    assert remat.verify(model, batch, made, **STEP).identical


# -- leaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [chained(Average), lambda: stack(lambda: Block(16))])
def test_models_die_after_plan_apply_and_remove(build, batch):
    """Nothing in remat keeps a model alive that was planned, verified, trained and freed of it."""
    model = build()
    made = tightest(model, batch, **STEP)
    remat.verify(model, batch, made, **STEP)
    handle = remat.apply(model, made)
    square_mean(model, batch).backward()
    handle.remove()
    alive = [weakref.ref(m) for m in model.modules()]
    alive += [weakref.ref(p) for p in model.parameters()]
    del model, handle
    gc.collect()
    assert not any(r() is not None for r in alive)


@pytest.mark.usefixtures("heap_of_its_own")
def test_cycles_of_apply_and_remove_grow_nothing(batch):
    """Fifty cycles of apply, step and remove leave as many tensors alive as two do."""
    model = stack(lambda: Block(16, norm=nn.BatchNorm1d(16)))
    made = all_blocks(model, batch)

    def cycles(count):
        for _ in range(count):
            with remat.apply(model, made):
                square_mean(model, batch).backward()
            model.zero_grad()
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))

    before = cycles(2)
    assert cycles(50) == before
    assert all("forward" not in m.__dict__ for m in model.modules())
