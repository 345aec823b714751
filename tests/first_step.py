"""The first step of a fresh process under plans from files: what tests of first steps run.

    python -m tests.first_step MODEL plan.json...

Prints the measured peak in bytes for each plan, in a process forked from one that has run nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial

import torch
from torch import nn

import remat
from benchmarks import shapes
from benchmarks.shapes import PreNormBlock
from remat.trace.step import compute_loss
from tests.loops import measured_step
from tests.models import Block, square_mean

WIDTH = 32


class Dropped(nn.Module):
    """Dropout as CUDA runs it, with a mask of booleans."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(torch.native_dropout(self.first(x), 0.3, True)[0])


def _blocks():
    return nn.Sequential(*(Block(WIDTH, nn.BatchNorm1d(WIDTH)) for _ in range(4)))


def _pooled():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Dropout2d())


def _attention():
    return nn.Sequential(PreNormBlock(WIDTH, 4, 0.2), PreNormBlock(WIDTH, 4, 0.2))


def _language_model(dropout=0.1, **shape):
    shape = {
        "layers": 2,
        "width": WIDTH,
        "heads": 2,
        "vocabulary": 97,
        "batch": 2,
        "tokens": 32,
    } | shape
    case = shapes.gpt2(dropout=dropout, **shape)
    return case.model, case.batch, case.loss


# Name -> a function that makes model, batch and loss.
MODELS = {
    "blocks": lambda: (_blocks(), torch.randn(512, WIDTH), square_mean),
    "booleans": lambda: (nn.Sequential(Dropped(), Dropped()), torch.randn(512, WIDTH), square_mean),
    "positions": lambda: (_pooled(), torch.randn(4, 3, 32, 32), square_mean),
    "attention": lambda: (_attention(), torch.randn(2, 64, WIDTH), square_mean),
    "language": _language_model,
    "wide language": lambda: _language_model(0.0, vocabulary=2048, batch=4, tokens=128),
}


def made(name):
    """Make a model, its batch and its loss, the same in every process."""
    torch.manual_seed(0)
    return MODELS[name]()


def measure(name, path):
    """Load the plan, apply it, and measure one step."""
    model, batch, loss = made(name)
    with remat.apply(model, remat.Plan.load(path)):
        run = partial(compute_loss, model, batch, loss)
        print(measured_step(model, batch, None, lambda: run().backward()), flush=True)


def main(name, *paths):
    """Measure each plan in a process of its own, one after another.

    Only what is imported is shared: what models are made of, and what torch imports in its first
    step, which takes seconds.
    """
    importlib.import_module("torch._dynamo")
    made(name)
    for path in paths:
        child = os.fork()
        if not child:
            measure(name, path)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"the step under {path} failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
