"""Equality bit for bit: of weights by digest, of loss curves by their bits."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def weights_sha256(model: nn.Module) -> str:
    """Digest names, dtypes, shapes and bytes of all parameters and buffers.

    Buffers that are not saved with the model (`persistent=False`) count too: they are part of what
    training may change.
    """
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_bits(left: Sequence[float], right: Sequence[float]) -> bool:
    """Say whether two curves are equal bit for bit; a NaN equals the same NaN."""
    return len(left) == len(right) and _bits(left) == _bits(right)


def _bits(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)
