"""Checkpointing that a model's author wrote: every call of torch's, seen or switched off.

NOTE [ Where checkpointing is caught ]
People import `checkpoint` by name, so replacing that name would miss them. Its two ways look their
machinery up in `torch.utils.checkpoint` at each call: the autograd function of the reentrant one
and the generator of the other. These two are replaced, once for all threads, and ask the innermost
visitor of their own thread. remat's own regions pass through unseen. Libraries with machinery of
their own (fairscale, DeepSpeed) are not caught.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch.utils.checkpoint as library

# Any: a checkpointed function and its arguments are the user's own.

_REENTRANT: Final = "CheckpointFunction"
_OTHER: Final = "_checkpoint_without_reentrant_generator"

_lock = threading.Lock()
_num_users = 0
_original: dict[str, Any] = {}
_thread = threading.local()


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointCall:
    """One call of torch's checkpoint: what is to run again, and how."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_reentrant: bool
    preserves_random_state: bool


class AbstractVisitor(ABC):
    """Sees each call of torch's checkpoint, and says which of them is to run as a plain call."""

    @abstractmethod
    def enter(self, call: CheckpointCall) -> bool:
        """Note that a call begins; return whether checkpointing stays on for it."""

    @abstractmethod
    def leave(self, call: CheckpointCall, output: Any) -> None:
        """Note that its forward ended, or failed; `output` is known of reentrant calls only."""


class SwitchOff(AbstractVisitor):
    """Run every checkpointed function as a plain call, or only those `numbers`, from 0."""

    def __init__(self, numbers: frozenset[int] | None = None) -> None:
        self._numbers = numbers
        self._count = 0

    def enter(self, call: CheckpointCall) -> bool:  # noqa: ARG002  they are only counted
        """Switch the call off if its number is among those wanted."""
        self._count += 1
        return self._numbers is not None and self._count - 1 not in self._numbers

    def leave(self, call: CheckpointCall, output: Any) -> None:
        """Do nothing."""


@contextlib.contextmanager
def visited(visitor: AbstractVisitor) -> Iterator[None]:
    """Send this thread's calls of torch's checkpoint through a visitor.

    See NOTE [ Where checkpointing is caught ].
    """
    stack = _visitors()
    _install()
    stack.append(visitor)
    try:
        yield
    finally:
        stack.pop()
        _uninstall()


def checkpointing_off() -> contextlib.AbstractContextManager[None]:
    """Run every function that is checkpointed through torch as a plain call, in this thread."""
    return visited(SwitchOff())


def _visitors() -> list[AbstractVisitor]:
    if not hasattr(_thread, "visitors"):
        _thread.visitors = []
    found: list[AbstractVisitor] = _thread.visitors
    return found


def _install() -> None:
    global _num_users  # noqa: PLW0603  the one patch is shared by all threads
    with _lock:
        if _num_users == 0:
            for name in (_REENTRANT, _OTHER):
                _original[name] = getattr(library, name)
            setattr(library, _REENTRANT, _Reentrant)
            setattr(library, _OTHER, _without_reentrant)
        _num_users += 1


def _uninstall() -> None:
    global _num_users  # noqa: PLW0603  as above
    with _lock:
        _num_users -= 1
        if _num_users == 0:
            for name, value in _original.items():
                setattr(library, name, value)
            _original.clear()


class _Reentrant:
    """Stands in for torch's autograd function of reentrant checkpointing."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        original = _original[_REENTRANT]
        visitor = _visitor()
        if visitor is None:
            return original.apply(function, preserve, *args)
        call = CheckpointCall(function, args, {}, True, preserve)
        is_on, output = visitor.enter(call), None
        try:
            output = original.apply(function, preserve, *args) if is_on else function(*args)
        finally:
            visitor.leave(call, output)
        return output


def _without_reentrant(
    function: Callable[..., Any],
    preserve: bool,
    context_fn: Any,
    determinism_check: Any,
    debug: Any,
    early_stop: Any,
    *args: Any,
    **kwargs: Any,
) -> Iterator[None]:
    """Stand in for torch's generator, which runs before and after the function's forward."""
    generator = _original[_OTHER](
        function, preserve, context_fn, determinism_check, debug, early_stop, *args, **kwargs
    )
    visitor = _visitor()
    if visitor is None:
        return generator  # type: ignore[no-any-return]
    return _visit(visitor, CheckpointCall(function, args, kwargs, False, preserve), generator)


def _visit(
    visitor: AbstractVisitor, call: CheckpointCall, generator: Iterator[None]
) -> Iterator[None]:
    is_on = visitor.enter(call)
    try:
        if is_on:
            yield from generator
        else:
            yield
    finally:
        visitor.leave(call, None)


def _visitor() -> AbstractVisitor | None:
    """Return the visitor that wants to see the present call; none for regions of a plan."""
    stack = _visitors()
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back  # type: ignore[assignment]
    is_ours = frame is not None and frame.f_globals.get("__name__", "").startswith("remat.regions.")
    return stack[-1] if stack and not is_ours else None
