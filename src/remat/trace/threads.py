"""Threads: what a step runs on other threads than its own, no trace sees and no region replays.

Modes and hooks of torch are those of one thread. What another one computes would be missing from
the predicted peak, and what it draws would be drawn anew when a region runs again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from remat.errors import CaptureError

# Any: arguments of ops are whatever torch passes.


class Threads:
    """Which threads a trace follows, and the first thing that was done on another.

    Autograd takes modes along to threads of its own: these are followed.
    """

    def __init__(self) -> None:
        self._followed = {threading.get_ident()}
        self._unseen = ""
        self._lock = threading.RLock()  # fake tensors are not made for several threads at once

    def follow(self) -> None:
        """Note that the recorder sees the ops of this thread."""
        self._followed.add(threading.get_ident())

    def is_unseen(self, what: object) -> bool:
        """Whether this thread is not followed; what it does is noted then, by its name."""
        if threading.get_ident() in self._followed:
            return False
        self._unseen = self._unseen or str(what)
        return True

    def note_result(self, tensor: Tensor) -> None:
        """Note a tensor that no recorded op has made, if its graph says that an op did."""
        if tensor.grad_fn is not None:
            self._unseen = self._unseen or tensor.grad_fn.name()

    def watch(self, mode: FakeTensorMode) -> None:
        """Note ops on fake tensors of a mode, which find it from any thread."""
        dispatch: Callable[..., Any] = mode.dispatch

        def dispatched(func: Any, *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.is_unseen(func)
                return dispatch(func, *args, **kwargs)

        mode.dispatch = dispatched  # type: ignore[method-assign]

    def check(self) -> None:
        """Refuse a step of which parts ran out of sight.

        Raises
        ------
        CaptureError: naming the first of them.
        """
        if self._unseen:
            raise CaptureError(
                f"the step runs ops on a thread of its own (first {self._unseen}), where no trace "
                "sees them and a recomputation could not repeat them: under a plan, run them on "
                "the thread that calls the model."
            )
