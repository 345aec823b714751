"""Around a region's function: run again as it was run, or refused where that cannot be done.

NOTE [ What may change before backward ]
Between forward and backward a user may flip training mode, leave a context that chose the kernels
of attention or the default dtype, draw from Python's or NumPy's generator, or write to a parameter.
Mode and switches are set back while the region runs again, and so are the generators where the
region drew from them. A parameter's old values are gone: without a plan autograd would
have refused, by the version of the tensor that it saved, and so do we.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm

from remat.errors import ApplyError

# Any: a module's arguments and results are the user's own.


# Functions that set the switches of torch's own that decide which ops a module runs, in the order
# of `_switches`.
_SET_SWITCHES: tuple[Callable[[Any], None], ...] = (
    torch.backends.cuda.enable_flash_sdp,
    torch.backends.cuda.enable_mem_efficient_sdp,
    torch.backends.cuda.enable_math_sdp,
    torch.backends.cuda.enable_cudnn_sdp,
    torch.set_default_dtype,
)


class Lane:
    """What regions share that only one thread at a time may be in: 0, or which thread that is.

    Regions of one plan share modules, whose buffers, hooks and modes one of them may set back; all
    that draw random numbers share the generators of the process.
    """

    def __init__(self) -> None:
        self.thread = 0


DRAWING = Lane()


class Guarded:
    """A region's function; its first call is the forward, each later one a recomputation."""

    __slots__ = ("_forward", "_lane", "_modules", "_random", "_switches", "_training", "_versions")

    def __init__(
        self,
        modules: tuple[nn.Module, ...],
        forward: Callable[..., Any],
        *,
        lane: Lane,
        draws_python_random: bool,
    ) -> None:
        self._forward, self._lane = forward, lane
        self._modules = modules
        self._training: list[bool] | None = None
        self._versions: list[int] = []
        self._switches: tuple[Any, ...] = ()
        self._random: Any = draws_python_random

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, or run it again as it was.

        Raises
        ------
        ApplyError: if another thread is in such a region, or a parameter was written to meanwhile.
        """
        lane, thread = self._lane, threading.get_ident()
        before = lane.thread
        if before not in (0, thread):
            raise ApplyError(
                "two threads train planned models at once, and regions that run again set back "
                "random states and modules that both use: train in processes, or take the plans "
                "off with handle.remove()."
            )
        lane.thread = thread
        try:
            if self._training is None:
                self._training = [m.training for m in self._modules]
                self._versions = _versions(self._modules)
                self._switches = _switches()
                self._random = _python_random() if self._random else None
                return self._forward(*args, **kwargs)
            self._check_parameters()
            is_same = self._switches == _switches()
            is_same &= self._training == [m.training for m in self._modules]
            if is_same and self._random is None:
                return self._forward(*args, **kwargs)
            with (
                _modes(self._modules, self._training),
                _switched(self._switches),
                _drawing_from(self._random),
            ):
                return self._forward(*args, **kwargs)
        finally:
            lane.thread = before

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


def all_modules(members: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """List modules and those inside them, each once.

    What `nn.Module.modules` yields, in another order and for a tenth of the calls: this runs for
    every region of every step, as the tree may have changed since the last.
    """
    found = list(members)
    seen = set(found)
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return tuple(found)


def _versions(modules: tuple[nn.Module, ...]) -> list[int]:
    try:
        return [
            parameter._version
            for module in modules
            for parameter in module._parameters.values()
            if parameter is not None and not parameter.is_inference()
        ]
    except RuntimeError as error:
        if "Expanded Weights" not in str(error):
            raise
        raise ApplyError(
            "a plan cannot be used with per-sample gradients by expanded weights, which are gone "
            "when a region runs again: use Opacus with hooks (GradSampleModule), or take the plan "
            "off with handle.remove()."
        ) from error


@contextlib.contextmanager
def _modes(modules: tuple[nn.Module, ...], training: list[bool]) -> Iterator[None]:
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


def _switches() -> tuple[Any, ...]:
    # What the functions of torch.backends.cuda return, for half the calls: this runs per region.
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
        torch.get_default_dtype(),
    )


@contextlib.contextmanager
def _switched(states: tuple[Any, ...]) -> Iterator[None]:
    """Set torch's switches to what they were, and back."""
    present = _switches()
    for write, was in zip(_SET_SWITCHES, states, strict=True):
        write(was)
    try:
        yield
    finally:
        for write, now in zip(_SET_SWITCHES, present, strict=True):
            write(now)


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
