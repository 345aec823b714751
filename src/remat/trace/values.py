"""Values of small integer and boolean tensors, followed beside their fakes.

Masks, lengths and positions steer a program through data-dependent branches. Where the batch is
real their values are known, and following them costs next to nothing: the traced program takes the
branches that the real one takes. Floating point values are never computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

# Any: arguments of ops are whatever torch passes.

# Larger tensors are not followed.
SHADOW_LIMIT: Final = 1 << 20

Shadows = tuple[tuple[Any, ...], dict[str, Any]]


def value_of(tensor: Tensor) -> Tensor | None:
    """Return the value that is known of a fake tensor."""
    value: Tensor | None = getattr(tensor, "_remat_value", None)
    if value is not None and hasattr(value.untyped_storage(), "_remat_unknown"):
        return None
    return value


def set_value(fake: Tensor, value: Tensor | None) -> None:
    """Note the value of a fake tensor, or that it is no longer known."""
    fake._remat_value = value  # type: ignore[attr-defined]


def compute_from_values(func: Any, shadows: Shadows, mode: FakeTensorMode) -> Any:
    """Compute an op whose result depends on data from the values of its arguments."""
    with _disable_current_modes():
        real = func(*shadows[0], **shadows[1])

    def as_fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fake = mode.from_tensor(value, static_shapes=True)
        set_value(fake, value)
        return fake

    return tuple(map(as_fake, real)) if isinstance(real, tuple) else as_fake(real)


def shadow_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shadows | None:
    """Replace fake tensors by their values; `None` if any value is not known."""
    try:
        real_args = tuple(_shadow(a) for a in args)
        real_kwargs = {k: _shadow(v) for k, v in kwargs.items()}
    except LookupError:
        return None
    if "device" in real_kwargs and real_kwargs["device"] is not None:
        real_kwargs["device"] = torch.device("cpu")
    return real_args, real_kwargs


def _shadow(value: Any) -> Any:
    if isinstance(value, Tensor):
        known = value_of(value)
        if known is None:
            if isinstance(value, FakeTensor):
                raise LookupError
            return value
        return known
    if isinstance(value, (list, tuple)):
        return type(value)(_shadow(item) for item in value)
    return value


def follow_values(func: Any, shadows: Shadows, out: Any) -> bool:
    """Give small integer results of known values their own values; say whether that was done."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    single = (
        [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
    )
    if not single or not all(
        isinstance(t, FakeTensor) and not t.is_floating_point() and t.numel() <= SHADOW_LIMIT
        for t in single
    ):
        return False
    with _disable_current_modes(), torch.no_grad():
        real = func(*shadows[0], **shadows[1])
    reals = [real] if isinstance(real, Tensor) else list(real)
    for fake, value in zip(single, reals, strict=True):
        set_value(fake, value)
    return True


def forget_values(written: Iterable[Tensor]) -> None:
    """Stop following tensors that an op has written unknown values to, and all views of them."""
    for tensor in written:
        value = value_of(tensor)
        if value is not None:
            # Values are views of each other just as their fakes are.
            value.untyped_storage()._remat_unknown = True  # type: ignore[attr-defined]
