"""Families of ops whose time follows one curve: over FLOPs where they multiply, else over bytes."""

from __future__ import annotations

from typing import Final

from remat.trace.records import OpSignature, TensorMeta

MATMUL: Final = "matmul"
CONVOLUTION: Final = "convolution"
CONVOLUTION_BACKWARD: Final = "convolution backward"
ATTENTION: Final = "attention"
ATTENTION_BACKWARD: Final = "attention backward"
NORMALIZATION: Final = "normalization"
RANDOM: Final = "random"
GATHER: Final = "gather"
POOLING: Final = "pooling"
TRANSCENDENTAL: Final = "transcendental"
OPTIMIZER: Final = "optimizer"
POINTWISE: Final = "pointwise"

# Their time goes by arithmetic; that of all others by the bytes they read and write.
BY_FLOPS: Final = frozenset(
    {MATMUL, CONVOLUTION, CONVOLUTION_BACKWARD, ATTENTION, ATTENTION_BACKWARD}
)

# The first family with a part in the op's name; the order tells backward from forward.
_PARTS: Final = (
    (CONVOLUTION_BACKWARD, ("convolution_backward",)),
    (CONVOLUTION, ("convolution",)),
    (ATTENTION_BACKWARD, ("attention_backward", "attention_for_cpu_backward")),
    (ATTENTION, ("scaled_dot_product", "_flash_attention", "_efficient_attention")),
    (MATMUL, (".mm.", ".addmm.", ".bmm.", ".baddbmm.", ".mv.", ".dot.", ".linear.")),
    (OPTIMIZER, ("._foreach_", "._fused_")),
    (NORMALIZATION, ("_norm", "softmax", "nll_loss")),
    (RANDOM, ("dropout", "bernoulli", ".rand", ".normal", ".uniform")),
    (GATHER, ("embedding", "index", "gather", "scatter")),
    (POOLING, ("pool", "upsample")),
    (
        TRANSCENDENTAL,
        ("gelu", ".exp", ".log", "tanh", "silu", "sigmoid", "erf", ".pow", ".sin", ".cos", "sqrt"),
    ),
)


def family_of(name: str) -> str:
    """Return the family of an op, named as the trace does: `aten.mm.default` is a `matmul`."""
    for family, parts in _PARTS:
        if any(part in name for part in parts):
            return family
    return POINTWISE


def work_of(signature: OpSignature, flops: int, moved_bytes: int) -> float:
    """Return what the time of an op goes by: FLOPs where its family multiplies, else bytes.

    Kernels of attention that torch has no formula for are counted as two matrix products of
    queries and keys, (B, H, T, D) and (B, H, S, D): 4 B H T S D, and 2.5 times that in backward
    (Dao 2023, arXiv 2307.08691, section 4.1).
    """
    family = family_of(signature.name)
    if family not in BY_FLOPS:
        return moved_bytes
    if flops or family not in (ATTENTION, ATTENTION_BACKWARD):
        return flops
    tensors = [meta for meta in signature.arguments if isinstance(meta, TensorMeta)]
    first = 1 if family == ATTENTION_BACKWARD else 0  # after the gradient of the output
    if len(tensors) < first + 2 or not tensors[first + 1].shape:
        return 0
    queries, keys = tensors[first], tensors[first + 1]
    forward = 4.0 * queries.num_elements * keys.shape[-2]
    return 2.5 * forward if family == ATTENTION_BACKWARD else forward
