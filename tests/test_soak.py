"""Two thousand steps with plans put on and taken off at random: nothing grows, nothing changes."""

from __future__ import annotations

import gc
import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from tests.models import Block, square_mean

STEPS = 2000
EVERY = 250  # steps between two looks at what is alive
WIDTH = 16


def made():
    """A model that draws random numbers and updates buffers, and its optimizer."""
    torch.manual_seed(0)
    normed = Block(WIDTH, norm=nn.BatchNorm1d(WIDTH))
    model = nn.Sequential(normed, Block(WIDTH), Block(WIDTH))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def step(model, optimizer, batch, between=lambda: None):
    """Train on a batch; `between` is called after the forward."""
    torch.manual_seed(3)
    loss = square_mean(model, batch)
    between()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def alive():
    """How many tensors of the test are alive, and their bytes; and the resident bytes."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc").is_dir() else 0
    return len(tensors), sum(storages.values()), pages * 4096


def hooks(model):
    """Everything that could be left behind on modules: attributes, and entries of hook tables."""
    tables = [
        (name, key, len(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and value is not None
    ]
    attributes = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    return tables, attributes


@pytest.mark.slow
@pytest.mark.usefixtures("heap_of_its_own")
def test_plans_that_come_and_go_leave_nothing_behind():
    """Losses and weights are those of an undisturbed run; tensors, bytes and hooks do not grow."""
    model, optimizer = made()
    plain, plain_optimizer = made()
    batches = torch.randn(8, 32, WIDTH)
    batch = batches[0]
    plans = [
        plan_policy(model, batch, AllBlocks(), loss=square_mean),
        *remat.frontier(model, batch, points=3, loss=square_mean, chunks=False),
        remat.plan(model, batch, "90%", loss=square_mean, host_budget="1MiB"),
    ]
    assert sum(bool(plan.regions) for plan in plans) >= 3
    before, chance = hooks(model), random.Random(0)
    handle, counts = None, {"applied": 0, "removed": 0, "between": 0}
    looks = []

    def take_off(where):
        nonlocal handle
        if handle is not None:
            handle.remove()
            handle = None
            counts[where] += 1

    for number, batch in zip(range(STEPS), itertools.cycle(batches)):
        draw = chance.random()
        if draw < 0.3:
            take_off("removed")
        elif draw < 0.7 and handle is None:
            handle = remat.apply(model, chance.choice(plans))
            counts["applied"] += 1
        between = (lambda: take_off("between")) if draw > 0.9 else (lambda: None)
        assert step(model, optimizer, batch, between) == step(plain, plain_optimizer, batch)
        if number % EVERY == EVERY - 1:
            take_off("removed")
            assert hooks(model) == before
            looks.append(alive())
    assert min(counts.values()) > 50
    assert counts["applied"] == counts["removed"] + counts["between"]
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    (tensors, size, _), (_, _, resident) = looks[0], looks[1]
    assert [(n, b) for n, b, _ in looks] == [(tensors, size)] * len(looks)
    assert looks[-1][2] <= resident + 8 * 2**20
