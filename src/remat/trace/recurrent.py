"""What oneDNN's recurrent kernel gives, of which fake tensors tell less.

It returns its reserve as a tensor of bytes, whose size only oneDNN knows. So the kernel is
run once on zeros of the same shapes; where that would take much memory, on two shorter sequences,
as the size grows with their length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

# Any: ops and their arguments are torch's own, without types.

_KERNEL = "aten::mkldnn_rnn_layer"
# Bytes of a reserve that is made whole.
LARGEST_RESERVE = 32 * 2**20

_known: dict[str, int] = {}


def as_the_kernel(func: Any, args: tuple[Any, ...], out: Any, fake_mode: FakeTensorMode) -> Any:
    """Return the results of an op on fake tensors; of that kernel, as it really gives them.

    The forward's reserve has its size; the backward's gradients of both biases are two tensors.
    """
    if func._schema.name == _KERNEL:
        with fake_mode:
            return (*out[:3], torch.empty(_reserve_bytes(func, args), dtype=torch.uint8))
    if func._schema.name == f"{_KERNEL}_backward":
        with fake_mode:
            return (*out[:4], torch.empty_like(out[4]), *out[5:])
    return out


def _reserve_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes of a call's reserve; `args[0]` is the sequence (T, B, K)."""
    key = repr(tree_map(lambda a: (a.shape, a.dtype) if isinstance(a, Tensor) else a, args))
    known = _known.get(key)
    if known is None:
        known = _known[key] = _find(func, args)
    return known


def _find(func: Any, args: tuple[Any, ...]) -> int:
    length: int = args[0].shape[0]
    few = min(length, 16)
    some = _measured(func, args, few)
    if some * length <= LARGEST_RESERVE * few:
        return some if few == length else _measured(func, args, length)
    half = max(1, LARGEST_RESERVE * few // some // 2)
    short, longer = (_measured(func, args, n) for n in (half, 2 * half))
    return short + (longer - short) * (length - half) // half


def _measured(func: Any, args: tuple[Any, ...], length: int) -> int:
    def zeros(value: Any) -> Any:
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    with _disable_current_modes(), torch.enable_grad():  # without, it keeps nothing
        sequence = torch.zeros(length, *args[0].shape[1:], dtype=args[0].dtype)
        *_, reserve = func(sequence, *tree_map(zeros, args[1:]))
    return int(reserve.nbytes) if isinstance(reserve, Tensor) else 0
