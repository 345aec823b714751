"""Tensors that autograd saves, as hooks on saved tensors keep them.

Under such hooks torch does not check whether a tensor was written to since it was saved, and
differentiates what it is given: so it is checked here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from remat.trace.ops import device_of_fake

_is_checked: ContextVar[bool] = ContextVar("_is_checked", default=True)


@contextlib.contextmanager
def versions_unchecked() -> Iterator[None]:
    """Trace a step that torch would refuse without the model's own checkpointing, to find why."""
    token = _is_checked.set(False)
    try:
        yield
    finally:
        _is_checked.reset(token)


class Kept:
    """A saved tensor that stays where it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: the result of an op that its own gradient holds on to would never be freed.
        self.tensor = tensor.detach()
        self.version = tensor._version

    def read(self) -> Tensor:
        """Return it, unless it was written to."""
        _check_version(self.tensor, self.version, tuple(self.tensor.shape))
        return self.tensor


class Versions:
    """Tell of tensors of one trace whether they are written to after they were saved."""

    def __init__(self) -> None:
        self._nothing: dict[torch.device, Tensor] = {}

    def check_of(self, tensor: Tensor) -> Callable[[], None]:
        """Return what raises if a tensor was written to since now; it holds none of its memory."""
        if not _is_checked.get() or not is_plain(tensor):
            return lambda: None
        nothing = self._nothing_like(tensor)
        with torch.no_grad(), torch._C._DisableTorchDispatch():
            counter = tensor.detach()  # counts its versions together with the tensor
            counter.data = nothing.detach()
        version, shape = tensor._version, tuple(tensor.shape)
        return lambda: _check_version(counter, version, shape)

    def _nothing_like(self, tensor: Tensor) -> Tensor:
        """Return an empty tensor, fake where the given one is; it is made once for a device."""
        fake = tensor if isinstance(tensor, FakeTensor) else None
        device = tensor.device if fake is None else device_of_fake(fake)
        known = self._nothing.get(device)
        if known is None or isinstance(known, FakeTensor) is (fake is None):
            mode = fake.fake_mode if fake is not None else contextlib.nullcontext()
            with _disable_current_modes(), torch.no_grad(), mode:
                known = self._nothing[device] = torch.empty(0, device=device)
        return known


def _check_version(tensor: Tensor, version: int, shape: tuple[int, ...]) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: a tensor of shape {shape} is at version {tensor._version}, "
            f"expected version {version}."
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers at an offset of its memory."""
    return (
        (type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor))
        and tensor.layout == torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
