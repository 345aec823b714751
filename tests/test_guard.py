"""A guarded plan: measured in the first steps, warned of, and tightened once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import remat
from tests.models import Block, square_mean, tightest

WIDTH = 64


def made():
    """A model with dropout and buffers, its batch and optimizer, and a plan that keeps a lot."""
    model = nn.Sequential(
        *(Block(WIDTH, norm=nn.BatchNorm1d(WIDTH), dropout=0.5) for _ in range(4))
    )
    batch, optimizer = torch.randn(256, WIDTH), torch.optim.SGD(model.parameters(), lr=0.1)
    plan = remat.plan(model, batch, "95%", loss=square_mean, optimizer=optimizer)
    assert plan.regions
    return model, batch, optimizer, plan


def stepper(model, batch, optimizer, *, fails=()):
    """A training step that runs out of memory after the forward in the attempts `fails`."""
    attempts = iter(range(100))

    def run():
        optimizer.zero_grad()
        loss = square_mean(model, batch)
        if next(attempts) in fails:
            raise torch.OutOfMemoryError("injected")
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def said(caplog):
    """What remat itself has logged: threads of libraries log when they like."""
    return [r.getMessage() for r in caplog.records if r.name.partition(".")[0] == "remat"]


def test_guard_of_a_true_plan_says_nothing(caplog):
    """Measured steps that are as predicted make no event and no warning; remove takes all off."""
    model, batch, optimizer, plan = made()
    with remat.guard(model, batch, plan, loss=square_mean, optimizer=optimizer) as guard:
        run = stepper(model, batch, optimizer)
        losses = [guard.step(run) for _ in range(4)]
    assert guard.events == ()
    assert said(caplog) == []
    assert losses[-1] < losses[0]
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_drift_is_warned_of_with_numbers(caplog):
    """A batch twice as large as planned is seen in each measured step, with both peaks."""
    model, batch, optimizer, plan = made()
    large = torch.randn(512, WIDTH)
    with remat.guard(model, batch, plan, loss=square_mean, optimizer=optimizer, steps=2) as guard:
        for _ in range(5):
            guard.step(stepper(model, large, optimizer))
    assert [event.step for event in guard.events] == [1, 2]
    assert {event.kind for event in guard.events} == {"drift"}
    for event in guard.events:
        assert event.measured_peak_bytes > 1.3 * event.predicted_peak_bytes
        assert event.predicted_peak_bytes == plan.predicted_peak_bytes
    assert len(said(caplog)) == 2
    assert all("predicted" in message for message in said(caplog))


def test_out_of_memory_tightens_once_and_repeats_the_same_step(caplog):
    """The repeated step has the same random numbers and buffers: weights as of an unbroken run."""
    model, batch, optimizer, plan = made()
    other, _, other_optimizer, _ = made()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    plain = [stepper(other, batch, other_optimizer)() for _ in range(3)]
    torch.manual_seed(3)
    run = stepper(model, batch, optimizer, fails={1})
    with remat.guard(model, batch, plan, loss=square_mean, optimizer=optimizer) as guard:
        guarded = [guard.step(run) for _ in range(3)]
        assert guard.plan.predicted_peak_bytes <= 0.9 * plan.predicted_peak_bytes
    assert guarded == plain
    assert [event.kind for event in guard.events] == ["tightened"]
    assert guard.events[0].step == 1
    assert "tightened" in caplog.text
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_out_of_memory_is_the_users_where_nothing_is_left():
    """A second time, under the tightest plan, or once parameters were written: it is raised."""
    model, batch, optimizer, plan = made()
    run = stepper(model, batch, optimizer, fails={0, 1})
    with (
        remat.guard(model, batch, plan, loss=square_mean, optimizer=optimizer) as guard,
        pytest.raises(torch.OutOfMemoryError, match="injected"),
    ):
        guard.step(run)
    least = tightest(model, batch, loss=square_mean, optimizer=optimizer)
    run = stepper(model, batch, optimizer, fails={0})
    with (
        remat.guard(model, batch, least, loss=square_mean, optimizer=optimizer) as guard,
        pytest.raises(torch.OutOfMemoryError, match="no plan has a lower peak"),
    ):
        guard.step(run)
    assert all("forward" not in module.__dict__ for module in model.modules())

    def fails_late():
        stepper(model, batch, optimizer)()
        raise torch.OutOfMemoryError("in the optimizer's step")

    with (
        remat.guard(model, batch, plan, loss=square_mean, optimizer=optimizer) as guard,
        pytest.raises(torch.OutOfMemoryError, match="in the optimizer"),
    ):
        guard.step(fails_late)
    assert guard.events == ()


def test_guard_refuses_bad_input():
    """The number of measured steps is a whole number."""
    model, batch, optimizer, plan = made()
    for steps in (-1, True, 1.5):
        with pytest.raises(remat.ApplyError, match="steps must be an integer"):
            remat.guard(model, batch, plan, optimizer=optimizer, steps=steps)
