"""Locks between processes: on a file or folder, given back by the system when a process dies."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of an existing file or folder inside the block; one process has it at a time.

    The lock is `flock`'s: a process that is killed gives it back, and none is left behind on disk.
    Where there is none (Windows, some network file systems) the block runs without it.

    Raises
    ------
    BlockingIOError: with `wait=False`, if another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
