"""Random state, set for a stretch of code and given back afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (all devices) inside the block; restore their states after it.

    Every variant of an evaluation trains inside such a block with the same seed, so that weights,
    shuffling and dropout are the same and any difference comes from the plan.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002  the global generator is what user code draws from
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
