"""Two threads that train planned models at once are refused where they could take each other's."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from tests.models import Block, square_mean

WIDTH = 16
WAIT = 60.0


class Meets(Block):
    """A block in which two threads wait for each other, once it is told to."""

    def __init__(self, dropout):
        super().__init__(WIDTH, dropout=dropout)
        self.meeting = None

    def forward(self, x):
        if self.meeting is not None:
            self.meeting.wait(WAIT)
        return super().forward(x)


def planned(dropout, count=2):
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Meets(dropout) for _ in range(count))), torch.randn(8, WIDTH)
    remat.apply(model, plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None))
    return model, batch


def meet(*models):
    """Run a step of each model on a thread of its own, in their first blocks at the same time."""
    meeting = threading.Barrier(len(models))
    errors = []

    def train(model, batch):
        try:
            square_mean(model, batch).backward()
        except (remat.ApplyError, threading.BrokenBarrierError) as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=train, args=pair) for pair in models]
    for model, _ in models:
        model[0].meeting = meeting
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, _ in models:
        model[0].meeting = None
    return [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_threads_in_one_planned_model_are_refused(dropout):
    """The error says what to do, and the model trains on afterwards."""
    model, batch = planned(dropout)
    (error,) = meet((model, batch), (model, batch))
    assert isinstance(error, remat.ApplyError)
    assert "two threads" in str(error)
    square_mean(model, batch).backward()


def test_threads_with_models_of_their_own_share_generators_only():
    """Two planned models train side by side, unless both draw."""
    assert not meet(planned(0.0), planned(0.0))
    assert not meet(planned(0.0), planned(0.1))
    (error,) = meet(planned(0.1), planned(0.1))
    assert isinstance(error, remat.ApplyError)


def test_backward_on_another_thread_is_no_second_one():
    """One after the other, on any thread."""
    model, batch = planned(0.1)
    loss = square_mean(model, batch)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(p.grad is not None for p in model.parameters())
    square_mean(model, batch).backward()
