"""Around a region's function: run again as it was run, or refused where that cannot be done.

NOTE [ What may change before backward ]
Between forward and backward a user may flip training mode, draw from Python's or NumPy's generator,
or write to a parameter. The mode is set back while the region runs again, and so are the generators
where the region drew from them. A parameter's old values are gone: without a plan autograd would
have refused, by the version of the tensor that it saved, and so do we.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm

from remat.errors import ApplyError

# Any: a module's arguments and results are the user's own.


class Guarded:
    """A region's function; its first call is the forward, each later one a recomputation."""

    __slots__ = ("_forward", "_modules", "_random", "_training", "_versions")

    def __init__(
        self,
        members: tuple[nn.Module, ...],
        forward: Callable[..., Any],
        *,
        draws_python_random: bool,
    ) -> None:
        self._forward = forward
        self._modules = tuple(inner for member in members for inner in member.modules())
        self._training: tuple[bool, ...] | None = None
        self._versions: tuple[int, ...] = ()
        self._random: Any = draws_python_random

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, or run it again as it was."""
        if self._training is None:
            self._training = tuple(m.training for m in self._modules)
            self._versions = _versions(self._modules)
            self._random = _python_random() if self._random else None
            return self._forward(*args, **kwargs)
        self._check_parameters()
        with _modes(self._modules, self._training), _drawing_from(self._random):
            return self._forward(*args, **kwargs)

    def _check_parameters(self) -> None:
        if _versions(self._modules) != self._versions:
            name = type(self._modules[0]).__name__
            raise ApplyError(
                f"a parameter of a recomputed {name} was written to after its forward and before "
                "its backward: it cannot be run again with the values that it had. Write to "
                "parameters after backward, or take the plan off with handle.remove()."
            )


def refuse_transforms() -> None:
    """Refuse `torch.func.grad` and its like, under which no tensor can be saved by hooks.

    Raises
    ------
    ApplyError: saying what to do.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(layer.key() == torch._C._functorch.TransformType.Grad for layer in stack):
        raise ApplyError(
            "a plan cannot be used under torch.func.grad or vjp, which allow no hooks on saved "
            "tensors: take it off with handle.remove(), or use torch.autograd.grad."
        )


def must_run_eagerly(buffers: tuple[tuple[nn.Module, str], ...]) -> bool:
    """Whether a region that updates these buffers may not be compiled.

    A compiled region that writes to a buffer is run again on what it has written, without an error
    (`docs/conformance.md`, rows 11 to 13); batch norm's statistics alone are safe.
    """
    return any(not isinstance(module, _BatchNorm) for module, _ in buffers)


@_disable_dynamo
def run_eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function outside of what is compiled."""
    return function(*args, **kwargs)


def _versions(modules: tuple[nn.Module, ...]) -> tuple[int, ...]:
    return tuple(
        parameter._version
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None and not parameter.is_inference()
    )


@contextlib.contextmanager
def _modes(modules: tuple[nn.Module, ...], training: tuple[bool, ...]) -> Iterator[None]:
    """Set every module's training flag to what it was, and back."""
    present = [m.training for m in modules]
    changed = [
        (module, now)
        for module, now, was in zip(modules, present, training, strict=True)
        if now != was
    ]
    for module, now in changed:
        module.training = not now
    try:
        yield
    finally:
        for module, now in changed:
            module.training = now


@contextlib.contextmanager
def _drawing_from(states: Any) -> Iterator[None]:
    """Draw from Python's and NumPy's generators as they were, and then set them to what they are.

    See NOTE [ What may change before backward ].
    """
    if states is None:
        yield
        return
    present = _python_random()
    _set_python_random(states)
    try:
        yield
    finally:
        _set_python_random(present)


def _python_random() -> Any:
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy is not None else None


def _set_python_random(states: Any) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
