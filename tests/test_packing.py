"""Packed results: the same bits from fewer of them, at the moments that the planner says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import remat
from benchmarks.shapes import PreNormBlock
from remat.fit import Fit
from remat.planner.bound import lower_bound_seconds
from remat.planner.records import Region, SavedOp
from remat.regions.packing import Booleans, Positions
from tests.forced import apart, plan_of, slow_fit
from tests.models import Block, square_mean


class Dropped(nn.Module):
    """Dropout as CUDA runs it, with a mask of booleans, around a product that needs its result."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        kept, _ = torch.native_dropout(self.first(x), 0.3, True)
        return self.second(kept)


class Chosen(nn.Module):
    """A comparison decides between two branches."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        y = self.first(x)
        return self.second(torch.where(y > 0.1, y.exp(), -y))


class Pooled(nn.Module):
    """Convolutions around a pooling."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.pool, self.second = nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1)

    def forward(self, x):
        return self.second(self.pool(self.first(x)))


MODELS = {
    "noise": lambda: (nn.Sequential(Block(64), Block(64), Block(64)), torch.randn(512, 64)),
    "attention": lambda: (
        nn.Sequential(PreNormBlock(32, 4, 0.2), PreNormBlock(32, 4, 0.2)), torch.randn(2, 64, 32),
    ),
    "booleans": lambda: (nn.Sequential(Dropped(64), Dropped(64)), torch.randn(512, 64)),
    "comparison": lambda: (nn.Sequential(Chosen(64), Chosen(64)), torch.randn(512, 64)),
    "positions": lambda: (nn.Sequential(Pooled(8)), torch.randn(4, 3, 32, 32)),
    "wide_positions": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(5), nn.Conv2d(8, 8, 3)),
        torch.randn(1, 3, 200, 200, dtype=torch.float32).to(memory_format=torch.channels_last),
    ),
}  # fmt: skip


def planned(name):
    """A model, its batch, and the options of its step."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model, batch, slow_fit(model, batch)


def packings(fit, *, alone=False):
    """Positions of options that pack, or of those that do nothing else."""
    options = enumerate(fit.plain.options)
    return [p for p, o in options if o.packed_ops and not (alone and o.dropped_ops)]


def most_packed(fit, positions):
    """Pick options that do not exclude each other, those that pack most first."""
    return apart(fit, sorted(positions, key=lambda p: -len(fit.plain.options[p].packed_ops)))


@pytest.mark.parametrize("name", MODELS)
def test_packed_results_verify_and_peak_as_the_timeline_says(name):
    """Same bits under every option that packs; timeline, simulation and measured peak agree."""
    model, batch, fit = planned(name)
    found = packings(fit)
    assert found
    sample = found[:: max(1, len(found) // 3)]
    for chosen in [most_packed(fit, found), *([p] for p in sample)]:
        simulated = fit.plain.simulate(chosen).peak_bytes
        assert simulated == fit.plain.timeline.curve(chosen).peak_bytes
        plan = plan_of(fit, chosen).model_copy(update={"predicted_peak_bytes": simulated})
        proof = remat.verify(model, batch, plan, loss=square_mean, optimizer=None)
        assert proof.identical, (plan.regions, proof.differences[:2])
        assert abs(proof.measured_peak_bytes - simulated) <= 1024


class Counted(TorchDispatchMode):
    """Count the ops that ran, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_runs_again_where_results_are_only_packed():
    """Backward draws nothing, and runs no op of the forward but the scaling of the draws."""
    model, batch, fit = planned("noise")
    chosen = most_packed(fit, packings(fit, alone=True))
    assert chosen
    with remat.apply(model, plan_of(fit, chosen)):
        loss = square_mean(model, batch)
        with Counted() as counted:
            loss.backward()
    assert not [name for name in counted.names if "bernoulli" in name or "addmm" in name]
    assert "aten.div_.Scalar" in counted.names


def test_noise_takes_one_byte_for_each_element():
    """What a dropout drew frees three of its four bytes, at no recomputation at all."""
    _model, _batch, fit = planned("noise")
    chosen = most_packed(fit, packings(fit, alone=True))
    plan = plan_of(fit, chosen)
    number = 512 * 64 * len(MODELS["noise"]()[0])
    assert plan.packed_bytes == number
    assert plan.packing_seconds > 0
    assert sum(fit.plain.options[p].seconds for p in chosen) == 0
    first_read = fit.plain.trace.phase_start["backward"]
    before = fit.plain.timeline.curve(()).alive[first_read]
    after = fit.plain.timeline.curve(chosen).alive[first_read]
    assert before - after == 3 * number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.7])
def test_gradients_of_strange_numbers_are_the_same_bits(dtype, p):
    """Zeros with a sign, infinities and numbers that are none, for any rate and type."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(p), nn.Tanh()).to(dtype)
    batch = torch.randn(128, 64, dtype=dtype)
    batch[::7] *= -0.0
    batch[3, 5], batch[4, 6], batch[5, 7] = torch.inf, -torch.inf, torch.nan
    fit = slow_fit(model, batch)
    (chosen,) = most_packed(fit, [p for p in packings(fit) if fit.plain.options[p].module == "1"])

    def outcome():
        torch.manual_seed(2)
        model.zero_grad()
        loss = model(batch).nan_to_num().sum()
        loss.backward()
        bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
        left = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
        return [t.reshape(-1).view(bits) for t in left], torch.get_rng_state()

    plain, state = outcome()
    with remat.apply(model, plan_of(fit, [chosen])):
        ours, state_after = outcome()
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert torch.equal(state, state_after)


class Foreign(nn.Module):
    """Noise that a plan made for a dropout names as well, but that carries more than a bit."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(64, 64)

    def forward(self, x):
        y = self.linear(x)
        noise = torch.empty_like(y)
        if self.kind == "normal":
            noise.normal_()
        elif self.kind == "added":
            noise.bernoulli_(0.5).add_(y.detach())
        elif self.kind == "part":
            noise.fill_(2.0)[:7].bernoulli_(0.5)
        elif self.kind == "scaled_part":
            noise.bernoulli_(0.5)[:, ::2].div_(0.5)
        else:
            noise.bernoulli_(0.5).bernoulli_(0.3).div_(0.3)
        return y * noise


@pytest.mark.parametrize("kind", ["normal", "added", "part", "scaled_part", "twice"])
def test_plan_for_another_program_packs_only_what_is_known(kind):
    """Whatever a plan names, values come back right: what is not known to be bits is held whole."""
    model, batch = nn.Sequential(Foreign(kind)), torch.randn(128, 64)
    names = (
        "aten.empty_like.default", "aten.bernoulli_.float", "aten.div_.Scalar",
        "aten.normal_.default", "aten.add_.Tensor", "aten.fill_.Scalar",
    )  # fmt: skip
    named = [SavedOp(name=n, occurrence=i) for n, i in itertools.product(names, range(2))]
    regions = (Region(module="0", packed_ops=tuple(named)),)
    plan = Fit(model, batch, loss=square_mean, optimizer=None).plan("1000%")
    plan = plan.model_copy(update={"regions": regions})
    assert remat.verify(model, batch, plan, loss=square_mean, optimizer=None).identical


@pytest.mark.parametrize("shape", [(8,), (3, 16), (5, 4, 2), (2, 8, 6, 10)])
def test_booleans_are_the_bits_that_numpy_packs(shape):
    """Eight booleans lie in a byte as numpy packs them, and come back in the same layout."""
    values = torch.rand(shape) < 0.4
    for tensor in (values, values.permute(*reversed(range(values.dim())))):
        made = Booleans(tensor)
        memory = values.reshape(-1).numpy()
        assert np.array_equal(made._bits.numpy(), np.packbits(memory, bitorder="little"))
        assert torch.equal(made.unpacked(), tensor)
        assert made.unpacked().stride() == tensor.stride()


@pytest.mark.parametrize("side", [16, 17, 181, 182])
def test_positions_of_pooling_survive_in_the_narrowest_integers(side):
    """The last position of a plane fits: at 256, at 2**15, and above each."""
    images = torch.zeros(1, 2, side, side)
    images[:, :, -1, -1] = 1.0
    _, positions = functional.max_pool2d(images, side, return_indices=True)
    assert int(positions.max()) == side * side - 1
    width = torch.uint8 if side <= 16 else torch.int16 if side <= 181 else torch.int32
    packed = Positions(positions, width)
    assert torch.equal(packed.unpacked(), positions)
    assert packed.unpacked().dtype == torch.int64


def test_plan_with_dropout_stays_above_the_bound_and_tells_what_is_packed():
    """Packing is told in the printed plan, and no plan recomputes less than the bound."""
    torch.manual_seed(0)
    model, batch = MODELS["noise"]()
    fit = Fit(model, batch, loss=square_mean, optimizer=None)
    program = fit.plain
    least, most = program.solver.least_peak().peak_bytes, program.keep_all_peak_bytes
    is_packed = False
    for share in (0.2, 0.5, 0.9):
        plan = fit.plan(int(least + share * (most - least)))
        bound = lower_bound_seconds(program.timeline, program.cost, plan.budget_bytes)
        assert bound <= plan.recompute_fraction * plan.forward_seconds * (1 + 1e-9)
        assert ("packed" in str(plan)) == bool(plan.packed_bytes)
        assert remat.Plan.from_data(plan.model_dump(mode="json"), source="here") == plan
        is_packed |= bool(plan.packed_bytes)
    assert is_packed
