"""Small models that several tests share, and the tightest plan of any model."""

from __future__ import annotations

import torch
from torch import nn

import remat
from remat.fit import Fit


def square_mean(model, batch):
    """Loss: the mean square of the model's output."""
    return model(batch).square().mean()


class Block(nn.Module):
    """x + dropout(linear(gelu(linear(norm(x)))))."""

    def __init__(self, width: int, norm: nn.Module | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = norm or nn.LayerNorm(width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.body(self.norm(x)))


class Recurrent(nn.Module):
    """One block called several times."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.block = Block(width)
        self.depth = depth

    def forward(self, x):
        for _ in range(self.depth):
            x = self.block(x)
        return x


class Tower(nn.Module):
    """Two towers with the same weights, on two halves of the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(Block(width), Block(width))

    def forward(self, x):
        a, b = x.chunk(2)
        return self.tower(a) * self.tower(b)


def tightest(model, batch, **step) -> remat.Plan:
    """Return the plan with the least peak by recomputation: no budget below it can be met so."""
    return least_of(Fit(model, batch, **({"chunks": False} | step)))


def least_of(fit) -> remat.Plan:
    """Return the plan with the least peak that is in reach."""
    try:
        return fit.plan(1)
    except remat.BudgetError as error:
        return fit.plan(error.minimum_bytes)


def rising(low: int, high: int, count: int) -> list[int]:
    """Return evenly spaced budgets."""
    return [int(v) for v in torch.linspace(low, high, count, dtype=torch.float64)]
