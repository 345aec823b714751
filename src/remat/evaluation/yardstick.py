"""A fixed piece of work, timed in turn with the steps: it tells a slow machine from slow code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

# No label of a variant: those are made of letters.
YARDSTICK = "\N{STRAIGHT RULER}"
_SIZE = 256
_REPEATS = 6


@contextlib.contextmanager
def yardstick(device: torch.device) -> Iterator[Callable[[], None]]:
    """Give the work: products of matrices and passes over memory, some milliseconds on a CPU.

    It never changes, and draws no random numbers, so that its time in two runs tells how much
    faster one of the machines was, or how busy.
    """
    left = torch.linspace(-1.0, 1.0, _SIZE * _SIZE, device=device).reshape(_SIZE, _SIZE)

    def work() -> None:
        value = left
        for _ in range(_REPEATS):
            value = torch.tanh(value @ left)
        value.sum().item()  # waits for the device

    with torch.no_grad():
        yield work
