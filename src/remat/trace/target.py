"""CUDA without CUDA: let a step on fake CPU tensors run the ops that another device would choose.

Fake CUDA tensors abort a CPU-only torch in backward, so the step is traced on fake CPU tensors, and
the composite ops whose parts depend on the device are given the parts of that device.

NOTE [ Which attention ]
From PyTorch's `sdp_utils.cpp` (`aten/src/ATen/native/transformers/cuda`, read at commit 001f694a,
2026) and `sdp_utils_cpp.h`, for dense tensors; the first that may be used is used:
1. All but the last: four dimensions, the last without gaps (of a mask as well); sequences that are
   not empty; equal batches, and equal heads, or heads that divide the query's where grouped.
2. cuDNN (compute capability 9 and 10 only): half precision, head sizes in multiples of 8 up to 128
   (or 192 of keys with 128 of values), dropout in multiples of 1/16, more than one key, more than
   one query with dropout, a mask without a gradient, no deterministic algorithms asked for.
3. Flash (8.0 and up, ROCm): half precision, no mask, equal head sizes up to 256 (ROCm: 512), square
   if causal; on 8.6 to 8.9 and 12.x no head sizes from 193 to 224, nor up to 256 with dropout.
4. Memory efficient: half or single precision (bfloat16 from 8.0 on), head sizes of keys and values
   in multiples of 16 bytes (half precision; 4 elements of single precision from 8.0 on, else 1), no
   grouped heads on ROCm.
5. Otherwise, and on Apple's devices: attention written out, with all its scores.
A kernel that is turned off (`torch.backends.cuda`, `torch.nn.attention.sdpa_kernel`) is not used.
cuDNN and flash save the same: inputs, output, the logarithm of the sum and a seed.
"""

from __future__ import annotations

import contextlib
import enum
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from remat.trace.autocasting import autocast_on_the_cpu, cast_as_on_cuda

# Any: ops take what their schemas say, and torch's library of kernels is untyped.

_aten = torch.ops.aten
_HALF: Final = (torch.float16, torch.bfloat16)
# Half-precision heads whose size is no multiple of this are padded for the flash kernel.
_FLASH_MULTIPLE: Final = 8


class Attention(enum.Enum):
    """The kernels that attention can run on."""

    CUDNN = "cudnn"
    FLASH = "flash"
    EFFICIENT = "efficient"
    MATH = "math"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The device that a step is traced for.

    Arguments
    ---------
    device_type: torch's name of it; ROCm's is `cuda`.
    compute_capability: of an NVIDIA device, such as (9, 0); `None` elsewhere.
    is_rocm: an AMD device.
    """

    device_type: str
    compute_capability: tuple[int, int] | None = None
    is_rocm: bool = False

    @property
    def has_fused_kernels(self) -> bool:
        """Whether dropout and attention have kernels of CUDA's kind."""
        return self.device_type == "cuda"


def choose_attention(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    is_grouped: bool = False,
) -> Attention:
    """Return the kernel that PyTorch selects; see NOTE [ Which attention ]."""
    tensors = (query, key, value)
    if not target.has_fused_kernels or not _are_fit_for_kernels(tensors, mask, is_grouped):
        return Attention.MATH
    capability = target.compute_capability or (8, 0)
    half = _HALF if capability >= (8, 0) else (torch.float16,)
    heads = (query.shape[-1], key.shape[-1], value.shape[-1])
    if query.dtype in half:
        if _may_use_cudnn(target, query, key, heads, mask, dropout_p):
            return Attention.CUDNN
        if mask is None and _may_use_flash(
            target, query, key, heads, dropout_p=dropout_p, is_causal=is_causal
        ):
            return Attention.FLASH
    if query.dtype in (*half, torch.float32) and not (target.is_rocm and is_grouped):
        multiple = _efficient_multiple(capability, query.dtype)
        is_aligned = heads[0] == heads[1] and heads[0] % multiple == 0 == heads[2] % multiple
        if is_aligned and _is_on("mem_efficient"):
            return Attention.EFFICIENT
    return Attention.MATH


def _are_fit_for_kernels(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, is_grouped: bool
) -> bool:
    """Whether shapes, strides and types are what every fused kernel asks for."""
    query, key, value = tensors
    if any(t.dim() != 4 or t.dtype != query.dtype for t in tensors):
        return False
    if any(t.stride(-1) != 1 for t in (*tensors, *([] if mask is None else [mask]))):
        return False
    if min(query.shape[-2], key.shape[-2]) == 0:
        return False
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return False
    if key.shape[1] != value.shape[1]:
        return False
    return query.shape[1] == key.shape[1] or (is_grouped and query.shape[1] % key.shape[1] == 0)


def _is_on(kernel: str) -> bool:
    """Whether a kernel has not been turned off by the user."""
    enabled: Any = getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")
    return bool(enabled())


def _may_use_cudnn(
    target: Target,
    query: Tensor,
    key: Tensor,
    heads: tuple[int, int, int],
    mask: Tensor | None,
    dropout_p: float,
) -> bool:
    is_preferred = not target.is_rocm and (target.compute_capability or (0, 0))[0] in (9, 10)
    is_deterministic = (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    if not is_preferred or is_deterministic or not _is_on("cudnn"):
        return False
    if mask is not None and (mask.requires_grad or mask.dim() not in (2, 4)):
        return False
    if key.shape[-2] == 1 or (dropout_p > 0 and query.shape[-2] == 1):
        return False
    is_small = max(heads) <= 128 or heads == (192, 192, 128)
    return is_small and all(size % 8 == 0 for size in heads) and (dropout_p * 16).is_integer()


def _may_use_flash(
    target: Target,
    query: Tensor,
    key: Tensor,
    heads: tuple[int, int, int],
    *,
    dropout_p: float,
    is_causal: bool,
) -> bool:
    capability = target.compute_capability or (8, 0)
    most = 512 if target.is_rocm else 256
    if capability < (8, 0) or len(set(heads)) > 1 or heads[0] > most:
        return False
    if not _is_on("flash"):
        return False
    if is_causal and query.shape[-2] != key.shape[-2]:
        return False
    is_small_chip = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    if is_small_chip and any(t.requires_grad for t in (query, key)):
        return heads[0] <= 192 or (dropout_p == 0 and heads[0] > 224)
    return True


def _efficient_multiple(capability: tuple[int, int], dtype: torch.dtype) -> int:
    """Return what head sizes must be a multiple of: what matrix instructions are aligned to."""
    if dtype in _HALF:
        return 8 if capability >= (7, 0) else 1
    return 4 if capability >= (8, 0) else 1


@contextlib.contextmanager
def ops_of(target: Target | None) -> Iterator[None]:
    """Let composite ops take the target's parts while the context lasts, on CPU tensors.

    The ops are overridden in torch's dispatcher, below every Python name for them, so that it does
    not matter how a model calls them.
    """
    if target is None or not target.has_fused_kernels:
        yield
        return
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _attention_of(target), "AutogradCPU")
        cast_as_on_cuda(library)
    try:
        with autocast_on_the_cpu(target.device_type):
            yield
    finally:
        library._destroy()


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002  the op's own
    """Run `aten::dropout` as on CUDA: one kernel, and a mask of one byte an element."""
    if not train or not 0 < p < 1 or input.numel() == 0:
        return _aten.dropout.default.decompose(input, p, train)  # type: ignore[no-any-return]
    return _aten.native_dropout.default(input, p, train)[0]  # type: ignore[no-any-return]


def _attention_of(target: Target) -> Any:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        chosen = choose_attention(
            target, query, key, value, mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
            is_grouped=enable_gqa,
        )  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool and chosen is not Attention.MATH:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                attn_mask.logical_not(), float("-inf")
            )
        needs_sums = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if chosen is Attention.CUDNN:
            return _aten._scaled_dot_product_cudnn_attention.default(  # type: ignore[no-any-return]
                query, key, value, attn_mask, needs_sums, dropout_p, is_causal, False, scale=scale
            )[0]
        if chosen is Attention.FLASH:
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if chosen is Attention.EFFICIENT:
            if enable_gqa:
                repeats = query.shape[1] // key.shape[1]
                key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
            return _efficient(query, key, value, attn_mask, needs_sums, dropout_p, is_causal, scale)
        return _aten._scaled_dot_product_attention_math.default(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    return attention


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    size = query.shape[-1]
    missing = -size % _FLASH_MULTIPLE
    if missing:
        scale = scale if scale is not None else size**-0.5
        query, key, value = (torch.nn.functional.pad(t, (0, missing)) for t in (query, key, value))
    out: Tensor = _aten._scaled_dot_product_flash_attention.default(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
    return out[..., :size] if missing else out


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    needs_sums: bool,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    if mask is not None:
        length, wanted = mask.shape[-1], -mask.shape[-1] % 16
        if wanted:  # rows of the mask must be aligned
            mask = torch.nn.functional.pad(mask, (0, wanted))[..., :length]
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    return _aten._scaled_dot_product_efficient_attention.default(  # type: ignore[no-any-return]
        query, key, value, mask, needs_sums, dropout_p, is_causal, scale=scale
    )[0]


def default_to_foreach(optimizer: torch.optim.Optimizer | None, device_type: str) -> None:
    """Set what an optimizer would choose by itself on a device: on CUDA, all tensors at once.

    See `_default_to_fused_or_foreach` in `torch/optim/optimizer.py`, which looks at types and finds
    fakes to be none of torch's own; Adam with a tensor for its learning rate stays as it is.
    """
    if optimizer is None or device_type != "cuda":
        return
    for group in optimizer.param_groups:
        # A `fused=False` that was given keeps torch from choosing at all.
        is_open = "foreach" in group and group["foreach"] is None and group.get("fused") is None
        is_held = isinstance(group.get("lr"), Tensor) and not group.get("capturable")
        if is_open and not is_held and not group.get("differentiable"):
            group["foreach"] = True
