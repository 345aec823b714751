"""Shapes that change while training: one plan for each bucket, never a peak above the budget."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import remat
from remat.adapting.shapes import Buckets
from tests.loops import forwards_replaced, same_state, train
from tests.models import Block, square_mean

WIDTH = 32


class Sequences(nn.Module):
    """Blocks with dropout over (batch, length, width), which return their own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(WIDTH) for _ in range(3)))

    def forward(self, x):
        return {"loss": self.blocks(x).square().mean()}


class Pictures(nn.Module):
    """Convolutions with batch norm over pictures of any resolution."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inside, outside):
            return nn.Sequential(
                nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()
            )

        self.stages = nn.Sequential(stage(3, 8), stage(8, 8), stage(8, 8))

    def forward(self, x):
        return self.stages(x).mean(dim=(1, 2, 3))


def own_loss(model, batch):
    """Loss: what the model returns."""
    return model(batch)["loss"]


def sgd(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sequences(*shapes):
    return [torch.randn(*shape, WIDTH) for shape in shapes]


def both_ways(model, batches, loss, budget, *, accumulate=1, **options):
    """Train a copy without plans and the model with them; return the handle and its peaks."""
    plain = copy.deepcopy(model)
    expected, _ = train(plain, batches, loss, sgd(plain), accumulate=accumulate)
    optimizer = sgd(model)
    with remat.adapt(model, budget, loss=loss, optimizer=optimizer, **options) as handle:
        losses, peaks = train(
            model, batches, loss, optimizer, prepare=handle.prepare, accumulate=accumulate
        )
    assert losses == expected
    assert same_state(model.state_dict(), plain.state_dict())
    assert forwards_replaced(model) == []
    return handle, peaks


@given(size=st.integers(1, 100_000))
def test_buckets_round_up_by_an_eighth_at_most(size):
    """A bucket's largest size is its own bucket, not below the size, and at most 1/8 above."""
    largest = Buckets().above(size)
    assert size <= largest == Buckets().above(largest)
    assert largest <= size * 9 / 8 or size < 8
    assert Buckets().above(size + 1) >= largest


def test_buckets_that_are_given_are_used_and_larger_sizes_are_exact():
    """Sizes go up to the next that is given; above all of them, or without any, they stay."""
    given_sizes = Buckets((512, 128))
    assert [given_sizes.above(size) for size in (1, 128, 129, 512, 513)] == [
        128, 128, 512, 512, 513,
    ]  # fmt: skip
    assert Buckets(()).above(77) == 77


def test_each_length_trains_the_same_within_the_budget():
    """Losses and weights are those without plans, no peak is above the budget, plans are shared."""
    lengths = (64, 80, 78, 33, 64, 73)
    handle, peaks = both_ways(Sequences(), sequences(*((8, n) for n in lengths)), own_loss, "75%")
    budget = handle.history[0].plan.budget_bytes
    assert max(peaks) <= budget
    assert len(handle.history) == 3  # up to 64, 80 and 36
    assert {planned.plan.budget_bytes for planned in handle.history} == {budget}
    assert handle.planning_seconds > 0


def test_larger_batch_is_met_by_a_tighter_plan():
    """Twice the batch recomputes more, and keeps the same budget."""
    handle, peaks = both_ways(Sequences(), sequences((8, 64), (12, 64)), own_loss, "90%")
    first, second = (planned.plan for planned in handle.history)
    assert second.recompute_fraction > first.recompute_fraction
    assert second.keep_all_peak_bytes > first.budget_bytes >= max(peaks)


@pytest.mark.slow
def test_each_resolution_trains_the_same_within_the_budget():
    """Convolutions, whose kernels take workspace, and batch norm's statistics: the same."""
    model = Pictures()
    pictures = [torch.randn(4, 3, n, n) for n in (40, 44, 43, 35)]
    handle, peaks = both_ways(model, pictures, square_mean, "100%")
    assert max(peaks) <= handle.history[0].plan.budget_bytes


def test_gradients_of_earlier_micro_steps_are_in_the_budget():
    """With accumulation the peak of every micro-step, gradients and all, is as predicted."""
    handle, peaks = both_ways(
        Sequences(), sequences(*[(2, 16)] * 4), own_loss, "95%", accumulate=2, accumulates=True
    )
    plan = handle.history[0].plan
    assert max(peaks) <= plan.budget_bytes
    assert max(peaks) == pytest.approx(plan.predicted_peak_bytes, rel=0.01)


def test_model_with_its_own_loss_is_trained_by_an_unchanged_loop():
    """Without loss=, the forward itself finds the plan; each kind of argument may change."""
    model = Sequences()
    plain = copy.deepcopy(model)
    batches = sequences((8, 64), (8, 48), (8, 47), (8, 64))
    expected, _ = train(plain, batches, own_loss, sgd(plain))
    optimizer = sgd(model)
    with remat.adapt(model, "75%", optimizer=optimizer) as handle:
        with torch.no_grad():
            model(batches[0])
        assert handle.history == ()
        losses, _ = train(model, batches, own_loss, optimizer)
        assert len(handle.history) == 2
        assert handle.plan.regions
    assert losses == expected
    assert same_state(model.state_dict(), plain.state_dict())
    assert forwards_replaced(model) == []
    handle.remove()


def test_batch_that_cannot_fit_is_refused_before_its_forward():
    """The error names the batch and the least peak; smaller batches train on as before."""
    model, calls = Sequences(), []
    batches = sequences((8, 64), (8, 1024))
    optimizer = sgd(model)
    with remat.adapt(model, "70%", optimizer=optimizer, chunks=False) as handle:
        model(batches[0])["loss"].backward()
        model.blocks.register_forward_hook(lambda *call: calls.append(type(call[2])))
        with pytest.raises(remat.BudgetError, match=r"8x1024x32") as caught:
            model(batches[1])
        assert caught.value.minimum_bytes > handle.plan.budget_bytes
        assert Tensor not in calls  # fakes alone
        assert len(handle.history) == 1
        model(batches[0])["loss"].backward()
        assert calls.count(Tensor) == 1


class Uneven(nn.Module):
    """Takes more memory for odd lengths: no plan for an even one can be trusted there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(WIDTH) for _ in range(2)))

    def forward(self, x):
        if x.shape[1] % 2:
            x = torch.cat([x, x], dim=1)
        return {"loss": self.blocks(x).square().mean()}


def test_smaller_shape_that_takes_more_gets_a_plan_of_its_own():
    """What a shape takes under its bucket's plan is simulated first, not believed."""
    handle, peaks = both_ways(Uneven(), sequences((8, 64), (8, 62), (8, 61)), own_loss, "160%")
    assert [planned.shapes for planned in handle.history] == [
        ((8, 64, WIDTH),), ((8, 61, WIDTH),),
    ]  # fmt: skip
    assert max(peaks) <= handle.history[0].plan.budget_bytes


def test_plan_follows_modes_and_frozen_parameters():
    """Evaluation mode with gradients, and a layer that is frozen, are steps of their own."""
    model, (batch,) = Sequences(), sequences((4, 32))
    with remat.adapt(model, "80%") as handle:
        model(batch)["loss"].backward()
        model.blocks[0].requires_grad_(False)
        model(batch)["loss"].backward()
        model.eval()
        model(batch)["loss"].backward()
        assert [planned.plan.fingerprint.training for planned in handle.history] == [
            True, True, False,
        ]  # fmt: skip
        peaks = [planned.plan.keep_all_peak_bytes for planned in handle.history]
        assert peaks[1] < peaks[0]
        model.train()
        model(batch)["loss"].backward()
        assert len(handle.history) == 3


def test_plan_that_was_used_longest_ago_is_dropped():
    """With room for one plan, a step that comes again is planned for again."""
    model, (batch,) = Sequences(), sequences((4, 16))
    with remat.adapt(model, "1GiB", most_plans=1) as handle:
        for training in (True, False, False, True):
            model.train(training)(batch)["loss"].backward()
        assert len(handle.history) == 3


def test_plan_that_recomputes_nothing_serves_every_smaller_shape():
    """Below what fits without recomputation nothing is planned again, whatever the bucket."""
    model, losses = Sequences(), []
    with remat.adapt(model, "1GiB") as handle:
        losses += [model(b)["loss"].item() for b in sequences((8, 64), (8, 20), (2, 33))]
        assert len(handle.history) == 1
    assert len(set(losses)) == 3


def test_model_is_saved_copied_and_pickled_under_changing_plans(tmp_path):
    """Names and values are those of the model; a copy computes the same and plans nothing."""
    model, (batch,) = Sequences(), sequences((4, 32))
    names = list(model.state_dict())
    with remat.adapt(model, "70%") as handle:
        model(batch)["loss"].backward()
        assert list(model.state_dict()) == names
        other = Sequences()
        other.load_state_dict(model.state_dict())
        model.load_state_dict(other.state_dict())
        gradients = []
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
            twin.zero_grad()
            torch.manual_seed(3)
            twin(batch)["loss"].backward()
            gradients.append({name: p.grad for name, p in twin.named_parameters()})
            twin(torch.randn(2, 8, WIDTH))
        assert all(same_state(gradients[0], other) for other in gradients[1:])
        assert len(handle.history) == 2


def test_model_is_restored_after_an_exception():
    """Leaving the block by an exception takes everything off, and the handle plans no more."""
    model, (batch,) = Sequences(), sequences((4, 32))
    handle = remat.adapt(model, "70%", loss=own_loss)
    handle.prepare(batch)
    assert forwards_replaced(model)
    with pytest.raises(ZeroDivisionError), handle:
        raise ZeroDivisionError
    assert forwards_replaced(model) == []
    with pytest.raises(remat.ApplyError, match="was removed"):
        handle.prepare(batch)


def test_forward_that_was_replaced_on_top_is_not_lost():
    """A wrapper put around the model after remat.adapt is named, not taken off."""
    model, (batch,) = Sequences(), sequences((4, 32))
    handle = remat.adapt(model, "70%")
    wrapped = model.forward
    model.forward = lambda *args: wrapped(*args)
    with pytest.raises(remat.ApplyError, match="replaced the model's forward"):
        model(batch)
    model.forward = wrapped
    handle.remove()
    assert forwards_replaced(model) == []


def test_bad_input_is_refused():
    """Buckets, numbers of plans, budgets and models that are none, in one line each."""
    model, (batch,) = Sequences(), sequences((4, 32))
    with pytest.raises(remat.WorkloadError, match="buckets must be sizes"):
        remat.adapt(model, "1GiB", buckets=(64, 0))
    with pytest.raises(remat.WorkloadError, match="most_plans must be an integer"):
        remat.adapt(model, "1GiB", most_plans=0)
    with pytest.raises(remat.BudgetFormatError):
        remat.adapt(model, "8 gigs")
    with pytest.raises(remat.WorkloadError, match=r"must be a torch\.nn\.Module"):
        remat.adapt(batch, "1GiB")
    with (
        remat.auto_checkpoint(model, batch, "1GiB"),
        pytest.raises(remat.ApplyError, match="before adapting"),
    ):
        remat.adapt(model, "1GiB")
    with (
        remat.adapt(nn.Linear(WIDTH, 3), "1GiB") as handle,
        pytest.raises(remat.WorkloadError, match="pass loss="),
    ):
        handle._model(batch)
    assert forwards_replaced(model) == []


def test_training_goes_on_from_the_middle_of_an_epoch():
    """Saved and resumed with weights, optimizer and random state: the losses of an unbroken run."""
    lengths = (64, 50, 49, 64, 50, 61)
    batches = sequences(*((4, n) for n in lengths))
    start = Sequences()

    def run(model, optimizer, batches, budget):
        losses = []
        with remat.adapt(model, budget, optimizer=optimizer):
            for batch in batches:
                optimizer.zero_grad()
                value = model(batch)["loss"]
                value.backward()
                optimizer.step()
                losses.append(value.item())
        return losses

    unbroken, broken = copy.deepcopy(start), copy.deepcopy(start)
    torch.manual_seed(5)
    expected = run(unbroken, sgd(unbroken), batches, "1GiB")
    torch.manual_seed(5)
    optimizer = sgd(broken)
    losses = run(broken, optimizer, batches[:3], "75%")
    saved = pickle.dumps((broken.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    torch.manual_seed(99)
    weights, state, random_state = pickle.loads(saved)
    resumed = Sequences()
    resumed.load_state_dict(weights)
    optimizer = sgd(resumed)
    optimizer.load_state_dict(state)
    torch.set_rng_state(random_state)
    losses += run(resumed, optimizer, batches[3:], "75%")
    assert losses == expected
    assert same_state(resumed.state_dict(), unbroken.state_dict())


def test_square_mean_needs_prepare_and_says_what_is_on():
    """With loss=, prepare puts the plan on; the handle names it."""
    model = nn.Sequential(*(Block(WIDTH) for _ in range(2)))
    handle = remat.adapt(model, "80%", loss=square_mean)
    assert "no plan yet" in repr(handle)
    plan = handle.prepare(torch.randn(256, WIDTH))
    assert handle.plan is plan
    assert plan.summary() in repr(handle)
    assert plan.fingerprint.loss == "tests.models.square_mean"
    handle.remove()
