"""Workspace: bytes that kernels take for themselves, which fake tensors cannot show.

Convolutions reorder their operands into blocked layouts, attention takes a buffer for each thread,
and normalizations copy operands that are not contiguous. What they take is a fact of kernel, shape
and thread count, so it is measured: each such op of a step is run once by itself, on made-up
values, under the allocator's record. No activation of the step is made, and one op's operands are
alive at a time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from remat.cost.allocations import most_allocated
from remat.cost.replay import moved_bytes, replay
from remat.trace.recorder import tensors_in
from remat.trace.records import OpSignature, TensorMeta

# Any: an op's results are of many types.

_log = logging.getLogger(__name__)

_ALWAYS = frozenset({
    "aten.convolution",
    "aten.convolution_backward",
    "aten.native_batch_norm_backward",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward",
})  # fmt: skip
_IF_STRIDED = frozenset({
    "aten.native_layer_norm",
    "aten.native_layer_norm_backward",
    "aten.native_group_norm",
    "aten.native_group_norm_backward",
})  # fmt: skip

# Operands above this are replaced by fewer examples, and the workspace scaled up.
LARGEST_OPERANDS = 256 * 2**20

# A fact does not change within a process, and measuring it takes milliseconds: keep it.
_measured: dict[tuple[OpSignature, int], int] = {}


def measure_workspace(
    signatures: Iterable[OpSignature],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[OpSignature, int]:
    """Return the workspace in bytes of those CPU ops that take any, measured on this machine."""
    wanted = [s for s in signatures if _may_take_workspace(s)]
    threads = torch.get_num_threads()
    found: dict[OpSignature, int] = {}
    for number, signature in enumerate(wanted):
        size = _measured.get((signature, threads))
        if size is None:
            size = _measured[signature, threads] = _measure(signature)
        if size > 0:
            found[signature] = size
        if progress is not None:
            progress(number + 1, len(wanted))
    return found


def _may_take_workspace(signature: OpSignature) -> bool:
    family = signature.name.rpartition(".")[0]
    if family in _ALWAYS:
        return True
    return family in _IF_STRIDED and any(
        isinstance(a, TensorMeta) and not _is_contiguous(a) for a in signature.arguments
    )


def _is_contiguous(meta: TensorMeta) -> bool:
    expected = 1
    for size, step in zip(reversed(meta.shape), reversed(meta.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _measure(signature: OpSignature) -> int:
    shrink = -(-moved_bytes(signature) // LARGEST_OPERANDS)
    small = _with_fewer_examples(signature, shrink) if shrink > 1 else signature
    run = replay(small, torch.device("cpu"))
    if run is None:
        return 0
    results: list[Any] = []
    try:
        peak = most_allocated(lambda: results.append(run()))
    except (RuntimeError, TypeError) as error:
        _log.warning("workspace of %s could not be measured: %s", signature.name, error)
        return 0
    outputs = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(results)
    }
    return max(0, peak - sum(outputs.values())) * shrink


def _with_fewer_examples(signature: OpSignature, factor: int) -> OpSignature:
    """Divide the first dimension of the tensors that share the largest one's."""
    metas = [a for a in signature.arguments if isinstance(a, TensorMeta) and len(a.shape) > 2]
    batch = max(metas, key=lambda m: m.num_elements).shape[0]
    arguments = tuple(
        dataclasses.replace(a, shape=(max(1, batch // factor), *a.shape[1:]))
        if isinstance(a, TensorMeta) and len(a.shape) > 2 and a.shape[0] == batch
        else a
        for a in signature.arguments
    )
    return dataclasses.replace(signature, arguments=arguments)
