"""Random generators that a user's modules hold: their states taken, and put back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

# Any: the state of a generator is its library's own.


def is_generator(value: object) -> bool:
    """Whether a value is a generator of torch's, NumPy's or Python's."""
    numpy = sys.modules.get("numpy")
    known = (numpy.random.Generator, numpy.random.RandomState) if numpy is not None else ()
    return isinstance(value, (torch.Generator, random.Random, *known))


def state_of(generator: Any) -> Any:
    """Take a generator's state."""
    for name in ("get_state", "getstate"):  # torch's and NumPy's older, Python's
        if hasattr(generator, name):
            return getattr(generator, name)()
    return generator.bit_generator.state


def put_state(generator: Any, state: Any) -> None:
    """Set a generator to a state taken by `state_of`."""
    for name in ("set_state", "setstate"):
        if hasattr(generator, name):
            getattr(generator, name)(state)
            return
    generator.bit_generator.state = state
