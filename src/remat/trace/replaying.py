"""A mark on ops that run again outside of any module, for whoever records the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def replaying() -> Iterator[None]:
    """Mark the ops inside as run again."""
    global _depth  # noqa: PLW0603  one counter per process: backward runs on other threads
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_replaying() -> bool:
    """Whether ops that run now are marked as run again."""
    return _depth > 0
