"""Arguments of an evaluation, checked before anything runs."""

from __future__ import annotations

import math

from remat.errors import WorkloadError


def check_counts(**counts: tuple[int | None, int]) -> None:
    """Refuse counts below their least value: `name=(value, least)`; `None` is not given.

    Raises
    ------
    WorkloadError: naming the argument, and what is allowed.
    """
    for name, (value, least) in counts.items():
        if value is not None and not (_is_integer(value) and value >= least):
            raise WorkloadError(f"{name} must be an integer >= {least}, got {value!r}.")


def checked_seed(seed: int, seeds: int) -> int:
    """Return the seed; further ones count up from it.

    Raises
    ------
    WorkloadError: if it is none.
    """
    if not _is_integer(seed) or not 0 <= seed <= 2**63 - seeds:
        raise WorkloadError(f"seed must be an integer from 0 to 2**63 - {seeds}, got {seed!r}.")
    return seed


def check_margin(margin: float | None) -> None:
    """Refuse a margin that is no positive number.

    Raises
    ------
    WorkloadError: with what was given.
    """
    if margin is None:
        return
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if not (is_number and math.isfinite(margin) and margin > 0):
        raise WorkloadError(f"margin must be a positive number, got {margin!r}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
