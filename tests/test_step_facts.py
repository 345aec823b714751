"""Facts of optimizers, precision and gradients: the predicted peak is that of the allocator."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import remat
from remat.prove.allocator import record_peak, step_tensors
from remat.prove.simulate import simulate
from tests.models import Block, square_mean

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW amsgrad": functools.partial(torch.optim.AdamW, amsgrad=True),
    "AdamW maximize": functools.partial(torch.optim.AdamW, maximize=True),
    "Adam decayed": functools.partial(torch.optim.Adam, weight_decay=0.1),
    "SGD": functools.partial(torch.optim.SGD, lr=0.1),
    "SGD momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "SGD Nesterov": functools.partial(
        torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "RMSprop centered": functools.partial(torch.optim.RMSprop, centered=True, momentum=0.9),
    "NAdam": torch.optim.NAdam,
    "Adafactor": torch.optim.Adafactor,
}
FUSED = frozenset({
    "AdamW", "AdamW amsgrad", "AdamW maximize", "Adam decayed", "SGD", "SGD momentum",
    "SGD Nesterov", "Adagrad",
})  # fmt: skip

WAYS = [
    (name, way)
    for name in OPTIMIZERS
    for way in ("foreach", "one by one", *(("fused",) if name in FUSED else ()))
]


def deep_and_small() -> tuple[nn.Module, Tensor]:
    """Weights that outweigh the activations: the optimizer makes the peak."""
    return nn.Sequential(*(Block(96) for _ in range(3))), torch.randn(8, 96)


def blocks(width: int = 64) -> tuple[nn.Module, Tensor]:
    """Activations that outweigh the weights."""
    return nn.Sequential(*(Block(width) for _ in range(4))), torch.randn(512, width)


def assert_predicted(model: nn.Module, batch: Tensor, **step: object) -> int:
    """The simulated peak is the measured one, to 4 KiB or a thousandth; return it."""
    predicted = simulate(model, batch, **step).peak_bytes  # type: ignore[arg-type]
    measured = remat.measure(model, batch, steps=1, **step).peak_bytes  # type: ignore[arg-type]
    assert abs(predicted - measured) <= max(4096, measured // 1000)
    return measured


# -- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_temporaries_of_optimizers_are_predicted(name: str, way: str) -> None:
    """Whether it steps one tensor at a time, all at once or fused, an optimizer's peak is known."""
    how = {"fused": True} if way == "fused" else {"foreach": way == "foreach"}
    model, batch = deep_and_small()
    optimizer = functools.partial(OPTIMIZERS[name], **how)
    assert_predicted(model, batch, loss=square_mean, optimizer=optimizer)


def test_what_capturable_refuses_is_said() -> None:
    """Capturable AdamW needs an accelerator; fused, it is planned."""
    model, batch = deep_and_small()
    refused = functools.partial(torch.optim.AdamW, capturable=True, foreach=False)
    with pytest.raises(remat.WorkloadError, match="capturable"):
        remat.plan(model, batch, "90%", loss=square_mean, optimizer=refused)
    fused = functools.partial(torch.optim.AdamW, capturable=True, fused=True)
    assert_predicted(model, batch, loss=square_mean, optimizer=fused)


def test_a_foreach_step_takes_more_and_the_plan_knows() -> None:
    """AdamW over all tensors at once holds a second copy of the weights, one by one does not."""
    model, batch = nn.Sequential(*(nn.Linear(128, 128) for _ in range(12))), torch.randn(4, 128)
    peaks = [
        assert_predicted(
            model, batch, loss=square_mean, optimizer=functools.partial(torch.optim.AdamW, **how)
        )
        for how in ({"foreach": True}, {"foreach": False}, {"fused": True})
    ]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert peaks[0] - peaks[1] > 0.7 * weights
    assert peaks[1] > peaks[2]


class BlockwiseSGD(torch.optim.Optimizer):
    """Momentum kept as uint8 blocks with a float scale each, as 8-bit optimizers do."""

    def __init__(self, parameters: object, lr: float = 0.1, block: int = 64) -> None:
        super().__init__(parameters, {"lr": lr, "block": block})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Take back to floats, move, and round again."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, size = self.state[parameter], group["block"]
                flat = parameter.grad.flatten()
                padded = nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
                if not state:
                    state["codes"] = torch.full_like(padded, 128, dtype=torch.uint8)
                    state["scales"] = padded.new_zeros(len(padded), 1)
                momentum = (state["codes"].float() - 128) / 127 * state["scales"]
                momentum.mul_(0.9).add_(padded)
                state["scales"].copy_(momentum.abs().amax(1, keepdim=True))
                scaled = momentum / state["scales"].clamp(min=1e-12) * 127
                state["codes"].copy_(scaled.round_().add_(128))
                moved = momentum.flatten()[: len(flat)].view_as(parameter)
                parameter.add_(moved, alpha=-group["lr"])


def test_states_of_eight_bits_are_counted_as_they_are() -> None:
    """A user's own optimizer with uint8 states is predicted, at a quarter of float states."""
    model, batch = deep_and_small()
    assert_predicted(model, batch, loss=square_mean, optimizer=BlockwiseSGD)
    found = simulate(model, batch, loss=square_mean, optimizer=BlockwiseSGD)
    floats = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    full = simulate(model, batch, loss=square_mean, optimizer=floats)
    assert 0.25 < found.breakdown["optimizer"] / full.breakdown["optimizer"] < 0.35


# -- which parameters are trained -----------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen linear layer and a trained product of two thin ones beside it."""

    def __init__(self, inner: nn.Linear, rank: int) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(requires_grad=False)
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the low-rank correction."""
        return self.inner(x) + self.up(self.down(x))


def test_frozen_parts_take_no_gradient_and_no_state() -> None:
    """With all but the last block frozen, peak and optimizer state are those of what trains."""
    model, batch = blocks()
    whole = assert_predicted(model, batch, loss=square_mean)
    for block in list(model)[:-1]:
        block.requires_grad_(requires_grad=False)
    assert assert_predicted(model, batch, loss=square_mean) < whole
    trained = sum(p.numel() * p.element_size() for p in model[-1].parameters())
    found = simulate(model, batch, loss=square_mean).breakdown["optimizer"]
    assert 2 * trained <= found <= 2 * trained + 4 * len(list(model[-1].parameters()))


def test_low_rank_adapters_are_planned_and_proved() -> None:
    """Adapters beside frozen weights: the plan keeps its budget and every bit."""
    model, batch = blocks()
    for block in model:
        for position in (0, 2):
            block.body[position] = LowRank(block.body[position], rank=4)
        block.norm.requires_grad_(requires_grad=False)
    assert_predicted(model, batch, loss=square_mean)
    plan = remat.plan(model, batch, "75%", loss=square_mean)
    assert plan.regions
    proof = remat.verify(model, batch, plan, loss=square_mean)
    assert proof.identical
    assert proof.within_budget
    assert abs(proof.peak_error) <= max(4096 / proof.measured_peak_bytes, 0.001)


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True], ids=["in the loss", "around the step"])
@pytest.mark.parametrize("budget", ["100%", "90%", "80%"])
def test_autocast_is_predicted_wherever_it_is_entered(outside: bool, budget: str) -> None:
    """Casts of weights are counted once a step, also where autocast keeps them between steps."""
    model, batch = blocks(128)

    def inside(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().square().mean()

    loss = square_mean if outside else inside
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        plan = remat.plan(model, batch, budget, loss=loss)
        with remat.apply(model, plan):
            measured = remat.measure(model, batch, loss=loss, steps=2).peak_bytes
    assert abs(plan.predicted_peak_bytes - measured) <= max(4096, measured // 1000)
    assert measured <= plan.budget_bytes


def test_batch_norm_under_autocast_saves_its_statistics_in_full_precision() -> None:
    """Many channels on few pixels, where what BatchNorm saves weighs: predicted to a KiB."""
    # One weight per channel, so that activations make the peak and not gradients.
    layers = (
        nn.Sequential(nn.Conv2d(512, 512, 1, groups=512), nn.BatchNorm2d(512)) for _ in range(8)
    )
    model = nn.Sequential(*layers)
    batch = torch.randn(2, 512, 2, 2)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().square().mean()

    predicted = simulate(model, batch, loss=loss, optimizer=None).peak_bytes
    measured = remat.measure(model, batch, loss=loss, optimizer=None, steps=1).peak_bytes
    assert 0 <= predicted - measured <= 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_precision_are_predicted(dtype: torch.dtype) -> None:
    """Weights, gradients and states of other widths are counted as they are."""
    model, batch = blocks()
    assert_predicted(model.to(dtype), batch.to(dtype), loss=square_mean)


# -- gradients that are there before ---------------------------------------------------------------


@pytest.mark.parametrize("way", ["accumulated", "set to zero"])
def test_gradients_from_before_fit_where_their_bytes_are_set_aside(way: str) -> None:
    """A plan for the budget less the gradients keeps the budget of a step that adds to them."""
    model, batch = blocks()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    keep_all = simulate(model, batch, loss=square_mean).peak_bytes
    budget = int(0.85 * keep_all)
    plan = remat.plan(model, batch, budget - gradients, loss=square_mean)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        if way == "set to zero":
            optimizer.zero_grad(set_to_none=False)
        square_mean(model, batch).backward()
        optimizer.step()

    with remat.apply(model, plan):
        step()
        alive = [*step_tensors(model, batch, optimizer)]
        alive += [p.grad for p in model.parameters() if p.grad is not None]
        peak = record_peak(step, alive, torch.device("cpu")).peak_bytes
    assert plan.predicted_peak_bytes < peak <= budget
