"""Ctrl-C that cannot be lost: told again at the next progress, if something swallowed it.

Python raises KeyboardInterrupt wherever it happens to be. In a destructor, or in a callback that a
library calls, it is printed at best and then forgotten, and the command would go on to its end.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_told = threading.Event()


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Remember a Ctrl-C that comes in here, where Python would raise it and no more."""
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    _told.clear()
    if is_ours:
        signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _told.clear()


def raise_again() -> None:
    """Raise a KeyboardInterrupt that came and was lost."""
    if _told.is_set():
        _told.clear()
        raise KeyboardInterrupt


def _raise(number: int, frame: FrameType | None) -> None:
    _told.set()
    signal.default_int_handler(number, frame)
