"""Random generators, of modules and global ones: their states, taken and put back."""

from __future__ import annotations

import random
import sys
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

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


class GlobalStates(NamedTuple):
    """Comparable states of the global generators: Python's and NumPy's, and torch's on the CPU."""

    python: Any
    torch: bytes


def global_states() -> GlobalStates:
    """Take the states of the global generators as they really are, also in a trace on fakes."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    position = (state[1].tobytes(), state[2]) if state is not None else None
    with _disable_current_modes():
        drawn = torch.default_generator.get_state().numpy().tobytes()
    return GlobalStates((random.getstate(), position), drawn)
