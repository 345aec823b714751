"""CUDA's autocast on fake CPU tensors: the same context, and the ops that it runs in float32.

From `aten/src/ATen/autocast_mode.h` and the list in PyTorch's notes on automatic mixed precision:
matrix products, convolutions and attention run in half precision on both devices; on CUDA sums,
norms and softmaxes are made from float32 besides, which the CPU leaves in half precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from remat.trace.standin import map_tensors

# Any: ops take what their schemas say, and torch's library of kernels is untyped.

_HALF: Final = (torch.float16, torch.bfloat16)
# Those of the list that transformers, convolutional nets and losses call.
_IN_FLOAT32: Final = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "pow.Tensor_Scalar", "rsqrt",
    "sum", "sum.dim_IntList", "exp", "log", "cumsum", "softplus", "norm.ScalarOpt_dim",
    "binary_cross_entropy_with_logits", "cosine_similarity",
)  # fmt: skip


def cast_as_on_cuda(library: Any) -> None:
    """Let ops run in float32 under autocast of the CPU that do so on CUDA."""
    for name in _IN_FLOAT32:
        library.impl(name, _in_float32(name), "AutocastCPU")


def _in_float32(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def widened(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in _HALF else tensor

    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*map_tensors(arguments, widened), **map_tensors(keywords, widened))

    return run


@contextlib.contextmanager
def autocast_on_the_cpu(target_type: str) -> Iterator[None]:
    """Let `torch.autocast(target_type)` mean the CPU's while the context lasts.

    A model's own code names the device that it is written for; its tensors are fakes on the CPU.
    """
    kind: Any = torch.amp.autocast_mode.autocast
    original = kind.__init__

    def begin(
        self: Any, device_type: str, dtype: torch.dtype | None = None, *rest: Any, **more: Any
    ) -> None:
        if device_type == target_type:
            device_type, dtype = "cpu", dtype or torch.float16
        original(self, device_type, dtype, *rest, **more)

    kind.__init__ = begin
    try:
        yield
    finally:
        kind.__init__ = original
