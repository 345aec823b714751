"""Workspace: bytes that kernels take for themselves, which fake tensors cannot show.

Convolutions reorder their operands into blocked layouts, losses and attention take buffers, and
many kernels copy operands that have gaps or repeats in memory. What they take is a fact of kernel,
shape and thread count, so it is measured: each such op of a step is run once by itself, on made-up
values, under the allocator's record. No activation of the step is made, and the operands of one op,
at most a few MiB, are alive at a time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from remat.cost.allocations import most_allocated
from remat.cost.replay import find_operator, moved_bytes, replay
from remat.trace.ops import tensors_in
from remat.trace.records import OpSignature, TensorMeta
from remat.trace.standin import random_states, restore_random_states

# Any: an op's results are of many types.

_log = logging.getLogger(__name__)

# Ops that take nothing where their operands are dense in memory, by survey; pointwise ops as well.
_FREE_IF_DENSE = frozenset({
    "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.dot", "aten.mv",
    "aten._softmax", "aten._softmax_backward_data",
    "aten._log_softmax", "aten._log_softmax_backward_data",
    "aten.native_layer_norm", "aten.native_layer_norm_backward", "aten.native_batch_norm",
    "aten.sum", "aten.mean", "aten.var_mean", "aten.amax", "aten.amin", "aten.max", "aten.argmax",
    "aten.nll_loss_forward", "aten.nll_loss_backward", "aten.embedding",
    "aten.embedding_dense_backward", "aten.cat", "aten.stack",
    "aten.gather", "aten.index_select", "aten.scatter", "aten.arange",
    "aten.max_pool2d_with_indices", "aten.avg_pool2d",
    "aten.slice_backward", "aten.select_backward", "aten.split_with_sizes_copy",
    "aten.constant_pad_nd", "aten.tril", "aten.triu", "aten.repeat", "aten.roll", "aten.flip",
})  # fmt: skip
# Ops that only make, fill or copy memory, whatever the strides.
_FREE = frozenset({
    "aten.clone", "aten.copy_", "aten._to_copy", "aten.empty", "aten.empty_like",
    "aten.empty_strided", "aten.zeros", "aten.zeros_like", "aten.ones", "aten.ones_like",
    "aten.full", "aten.full_like", "aten.fill_", "aten.zero_", "aten.new_empty", "aten.new_zeros",
    "aten.new_empty_strided", "aten.new_ones", "aten.new_full", "aten.scalar_tensor",
    "aten.lift_fresh", "aten.lift_fresh_copy", "aten._unsafe_view", "aten.rand", "aten.randn",
})  # fmt: skip
# Matrix products copy operands of these types into packed layouts.
_PACKED_DTYPES = frozenset({"bfloat16", "float16"})
# Which arguments have the examples in their first dimension, where a weight may have as many; of
# recurrent layers it is the steps of the sequence.
_EXAMPLES = {
    "aten.convolution": (0,), "aten.convolution_backward": (0, 1), "aten.mkldnn_rnn_layer": (0,),
    "aten.mkldnn_rnn_layer_backward": (0, 7, 10),
}  # fmt: skip

# Operands above this are replaced by fewer examples, and the workspace extrapolated.
LARGEST_OPERANDS = 32 * 2**20

# A fact does not change within a process, and measuring it takes milliseconds: keep it.
_measured: dict[tuple[OpSignature, int], int] = {}


# What gloo copies of a collective's arguments, by position, while the call lasts.
_COPIED_BY_GLOO = {"c10d._allgather_base_": 0, "c10d._reduce_scatter_base_": 1}


def measure_workspace(signatures: Iterable[OpSignature]) -> Mapping[OpSignature, int]:
    """Return the workspace in bytes of those CPU ops that take any, measured on this machine."""
    wanted = [s for s in signatures if _may_take_workspace(s)]
    threads = torch.get_num_threads()
    fresh = [s for s in wanted if (s, threads) not in _measured]
    if fresh:
        generators = random_states()
        try:
            for signature in fresh:
                _measured[signature, threads] = _measure(signature)
        finally:
            restore_random_states(generators)
    sizes = {s: _measured[s, threads] for s in wanted}
    return {s: size for s, size in sizes.items() if size > 0}


def _may_take_workspace(signature: OpSignature) -> bool:
    family = signature.name.rpartition(".")[0]
    operator = find_operator(signature.name)
    if operator is None or family in _FREE or getattr(operator, "is_view", False):
        return False
    metas = [a for a in signature.arguments if isinstance(a, TensorMeta)]
    if torch.Tag.pointwise in operator.tags or family in _FREE_IF_DENSE:
        is_packed = family in _FREE_IF_DENSE and any(m.dtype in _PACKED_DTYPES for m in metas)
        # Operands of another type than the result are copied first.
        is_mixed = len({m.dtype for m in metas if m.shape}) > 1 and family not in _FREE_IF_DENSE
        is_count = family == "aten.sum" and not metas[0].dtype.startswith(("float", "bfloat"))
        return is_packed or is_mixed or is_count or not all(_is_dense(m) for m in metas)
    return bool(metas)


def _is_dense(meta: TensorMeta) -> bool:
    """Whether a tensor fills its memory without gaps or repeats, in any order of dimensions."""
    expected = 1
    for step, size in sorted(zip(meta.stride, meta.shape, strict=True)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _measure(signature: OpSignature) -> int:
    """Run an op, or smaller ones of its kind, and return its workspace."""
    copied = _COPIED_BY_GLOO.get(signature.name.rpartition(".")[0])
    if copied is not None:
        return moved_bytes(dataclasses.replace(signature, arguments=(signature.arguments[copied],)))
    try:
        shrink = -(-moved_bytes(signature) // LARGEST_OPERANDS)
        if shrink == 1:
            return _measure_once(signature)
        examples = _examples(signature)
        if "scaled_dot_product" in signature.name:
            # A buffer for each thread, whatever the number of examples.
            return _measure_once(_with_examples(signature, examples, 1))
        few = max(1, examples // shrink // 2)
        small, large = (
            _measure_once(_with_examples(signature, examples, n)) for n in (few, 2 * few)
        )
        return max(0, round(small + (large - small) * (examples - few) / few))
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        _log.info("workspace of %s could not be measured: %s", signature.name, error)
        return 0


def _measure_once(signature: OpSignature) -> int:
    run = replay(signature, torch.device("cpu"))
    if run is None:
        return 0
    results: list[Any] = []
    peak = most_allocated(lambda: results.append(run()))
    outputs = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(results)
    }
    return max(0, peak - sum(outputs.values()))


def _examples(signature: OpSignature) -> int:
    known = _EXAMPLES.get(signature.name.rpartition(".")[0])
    first = signature.arguments[known[0]] if known else None
    if isinstance(first, TensorMeta):
        return first.shape[0]
    metas = [a for a in signature.arguments if isinstance(a, TensorMeta) and a.shape]
    return max(metas, key=lambda m: m.num_elements).shape[0]


def _with_examples(signature: OpSignature, examples: int, number: int) -> OpSignature:
    """Give the arguments that hold the examples fewer of them."""
    family = signature.name.rpartition(".")[0]
    positions = _EXAMPLES.get(family, range(len(signature.arguments)))
    arguments = list(signature.arguments)
    for position in positions:
        meta = arguments[position]
        if isinstance(meta, TensorMeta) and meta.shape and meta.shape[0] == examples:
            arguments[position] = dataclasses.replace(meta, shape=(number, *meta.shape[1:]))
    return dataclasses.replace(signature, arguments=tuple(arguments))
