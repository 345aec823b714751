"""What a training loop holds around one step, put into the step so that it is planned for.

NOTE [ Stand-ins ]
A traced step starts without gradients and holds one batch. Loops differ: micro-steps that
accumulate find gradients there, some loops clear them only between forward and backward, and
loaders fetch batches ahead. While a step is traced, empty tensors of the same sizes are made before
the forward and kept as long as the loop keeps them; real steps never run this.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remat.trace.parallel import parameters_in_buckets
from remat.trace.standin import map_tensors
from remat.trace.step import Loss

# Any: batches are the user's own types.


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is alive around a step, beyond what the step itself makes.

    `keeps_gradients`: gradients are there when a step begins, and are added to.
    `clears_late`: gradients of the step before are there in the forward, and gone in the backward.
    `spare_batches`: how many batches of this size are held beside the one at work.
    """

    keeps_gradients: bool = False
    clears_late: bool = False
    spare_batches: int = 0


class Surrounded:
    """A loss for tracing, with what is alive around it; see NOTE [ Stand-ins ]."""

    def __init__(self, loss: Loss, around: Surroundings) -> None:
        self._loss, self._around = loss, around
        self._spare: list[Tensor] = []
        functools.update_wrapper(self, loss)  # plans name the user's loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss, between what the loop does before and after the forward."""
        self.release()
        for _ in range(self._around.spare_batches):
            map_tensors(batch, self._hold)
        if self._around.keeps_gradients or self._around.clears_late:
            # Views of DDP's buckets need no room; what micro-steps left under `no_sync` does.
            views = [] if self._around.keeps_gradients else parameters_in_buckets(model)
            in_buckets = {id(p) for p in views}
            for parameter in model.parameters():
                is_free = parameter.grad is None and id(parameter) not in in_buckets
                if parameter.requires_grad and is_free:
                    parameter.grad = torch.empty_like(parameter)
        value = self._loss(model, batch)
        if self._around.clears_late and not self._around.keeps_gradients:
            for parameter in model.parameters():
                parameter.grad = None
        return value

    def release(self) -> None:
        """Let go of the batches that stood for others."""
        self._spare.clear()

    def _hold(self, tensor: Tensor) -> Tensor:
        self._spare.append(torch.empty_like(tensor))
        return tensor
