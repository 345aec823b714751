"""A region that comes back with other values than it had is refused by name, and only then."""

from __future__ import annotations

import logging
import os
from functools import partial

import pytest
import torch
from torch import nn

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from remat.regions import recall
from remat.trace.step import compute_loss
from tests.loops import measured_step
from tests.models import Block, square_mean

WIDTH = 32


class Scaled(Block):
    """A block that reads something from outside in each forward."""

    read = staticmethod(lambda: 1.0)

    def forward(self, x):
        return super().forward(x * self.read())


class Saving(Block):
    """A block that hands a tensor of any kind to autograd, which saves it."""

    class Keep(torch.autograd.Function):
        """The identity, which saves what else it is given."""

        @staticmethod
        def forward(ctx, x, other):
            ctx.save_for_backward(other)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            ctx.saved_tensors  # noqa: B018  where a region runs again
            return gradient, None

    def __init__(self, make):
        super().__init__(WIDTH)
        self.make = make

    def forward(self, x):
        return self.Keep.apply(super().forward(x), self.make(x))


def planned(make):
    """Three blocks of a kind, each recomputed."""
    model, batch = nn.Sequential(make(), make(), make()), torch.randn(64, WIDTH)
    plan = plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None)
    assert len(plan.regions) == 3
    return model, batch, plan


def test_a_change_before_backward_is_refused_by_name(monkeypatch):
    """The error names the class and the module, says what to do, and later steps are right."""
    model, batch, plan = planned(lambda: Scaled(WIDTH))
    with remat.apply(model, plan):
        loss = square_mean(model, batch)
        monkeypatch.setattr(Scaled, "read", staticmethod(lambda: 2.0))
        with pytest.raises(remat.ApplyError, match=r"Scaled '2' ran again .* handle\.remove\(\)"):
            loss.backward()
        model.zero_grad()
        square_mean(model, batch).backward()


def test_noise_from_outside_is_refused():
    """Numbers that the system gives are others each time, whatever the seed."""
    model, batch, plan = planned(lambda: Scaled(WIDTH))
    model[2].read = lambda: 1.0 + int.from_bytes(os.urandom(2), "big")
    with remat.apply(model, plan), pytest.raises(remat.ApplyError, match="Scaled '2'"):
        square_mean(model, batch).backward()


def test_verify_is_not_deceived_by_noise():
    """A model that differs from itself in every run is not called right for that."""
    model, batch, plan = planned(lambda: Scaled(WIDTH))
    model[0].read = lambda: 1.0 + int.from_bytes(os.urandom(1), "big")
    proof = remat.verify(model, batch, plan, loss=square_mean, optimizer=None)
    assert not proof.passed
    assert not proof.within_noise
    assert "recomputation of Scaled '0'" in {d.name for d in proof.differences}


def test_it_is_looked_at_again_after_many_steps(monkeypatch):
    """In between nothing is compared; in the first steps of each period it is."""
    monkeypatch.setattr("remat.regions.runtime.PERIOD", 5)
    model, batch, plan = planned(lambda: Scaled(WIDTH))
    refused = []
    with remat.apply(model, plan):
        for step in range(10):
            monkeypatch.setattr(Scaled, "read", staticmethod(lambda: 1.0))
            loss = square_mean(model, batch)
            monkeypatch.setattr(Scaled, "read", staticmethod(lambda: 2.0))
            try:
                loss.backward()
            except remat.ApplyError:
                refused.append(step)
    assert refused == [0, 1, 5, 6]


CHANGES = {
    "half precision": lambda x: x.to(torch.bfloat16),
    "a view across": lambda x: x.t()[3:, ::2],
    "one row many times": lambda x: x[:1].expand(64, WIDTH),
    "a scalar": lambda x: x.sum(),
    "infinite in part": lambda x: x.masked_fill(x < -1, -torch.inf),
    "integers": lambda x: (100 * x).long(),
    "booleans": lambda x: x > 0,
    "complex": lambda x: torch.view_as_complex(x.view(64, WIDTH // 2, 2)),
}


@pytest.mark.parametrize("make", CHANGES.values(), ids=CHANGES)
def test_any_kind_of_tensor_is_compared(make):
    """Saved as it is it passes; with rows and columns in another order it is refused."""
    model, batch, plan = planned(lambda: Saving(make))
    with remat.apply(model, plan):
        square_mean(model, batch).backward()
        loss = square_mean(model, batch)
        model[2].make = lambda x: make(1 - x.flip(0, 1))
        with pytest.raises(remat.ApplyError, match="Saving '2'"):
            loss.backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.full_like(x, float("nan")),
        lambda x: torch.full_like(x, float("inf")),
        lambda x: x[:0],
        lambda x: torch.zeros(64, dtype=torch.uint8),
    ],
    ids=["not a number", "infinite", "empty", "workspace"],
)
def test_what_cannot_differ_passes(make):
    """Values that are no numbers are the same when they come back the same."""
    model, batch, plan = planned(lambda: Saving(make))
    with remat.apply(model, plan):
        square_mean(model, batch).backward()


def test_rounding_passes(monkeypatch):
    """A kernel that sums in another order is no change."""
    model, batch, plan = planned(lambda: Scaled(WIDTH))
    with remat.apply(model, plan):
        loss = square_mean(model, batch)
        monkeypatch.setattr(Scaled, "read", staticmethod(lambda: 1 + 1e-6))
        loss.backward()


def test_buffers_updated_on_the_way_pass():
    """Batch norm saves its statistics, and has them updated once."""
    model, batch, plan = planned(lambda: Block(WIDTH, norm=nn.BatchNorm1d(WIDTH)))
    with remat.apply(model, plan):
        for _ in range(3):
            square_mean(model, batch).backward()
    assert model[1].norm.num_batches_tracked == 3


def test_looking_allocates_nothing(monkeypatch):
    """The peak of a step that is looked at is that of one that is not."""
    model, batch, plan = planned(lambda: Scaled(WIDTH))
    run = partial(compute_loss, model, batch, square_mean)
    peaks = []
    for looks in (2, 0):
        monkeypatch.setattr("remat.regions.runtime.LOOKS", looks)
        with remat.apply(model, plan):
            peaks.append(measured_step(model, batch, None, lambda: run().backward()))
            model.zero_grad()
    assert peaks[0] == peaks[1] <= plan.predicted_peak_bytes


def test_elsewhere_it_is_a_warning(caplog):
    """On other devices than the CPU unset memory may differ: said, and not refused."""
    first, second = (recall.Seen(torch.full((4,), value)) for value in (1.0, 2.0))
    with recall.Recall("Block '1'", ()):
        first = recall.Seen(torch.ones(4))
    for seen in (first, second):
        seen.form = (*seen.form[:2], torch.device("cuda", 0))
    with caplog.at_level(logging.WARNING, logger="remat"):
        assert first == second
    assert "Block '1' ran again in backward on other values" in caplog.text
