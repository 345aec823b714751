"""A trace of one batch size from those of two others: bytes and FLOPs are affine in the batch.

Every tensor of a step either has the examples as one of its dimensions or not, so each storage's
bytes, each op's FLOPs and its traffic are affine in their number, as long as the same ops run.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from remat.errors import CaptureError, WorkloadError
from remat.trace.records import Op, StepTrace, Storage
from remat.trace.standin import map_tensors

# Any: batches are the user's own types.

# Integer inputs up to this size keep their values, which control flow may depend on.
_MOST_VALUES = 2**20


def num_examples(batch: Any) -> int:
    """Return the first dimension of the batch's first tensor that has one.

    Raises
    ------
    WorkloadError: if no tensor has any dimension.
    """
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() > 0:
            sizes.append(tensor.shape[0])
        return tensor

    map_tensors(batch, note)
    if not sizes or sizes[0] < 1:
        raise WorkloadError(
            "the batch holds no tensor whose first dimension counts examples, so it cannot be made "
            "larger: pass make_batch, a function from a number of examples to a batch."
        )
    return sizes[0]


def with_examples(batch: Any, number: int) -> Any:
    """Return a batch of another number of examples: shapes alone, but for small integers.

    Tensors whose first dimension is that of the first tensor are taken to count examples there.
    """
    present = num_examples(batch)

    def resized(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != present:
            return tensor
        rest = tuple(tensor.shape[1:])
        is_abstract = tensor.device.type == "meta" or tensor.is_floating_point()
        if is_abstract or tensor[:1].numel() * number > _MOST_VALUES:
            return torch.empty((number, *rest), dtype=tensor.dtype, device="meta")
        return tensor[torch.arange(number) % present]

    return map_tensors(batch, resized)


@dataclasses.dataclass(frozen=True, slots=True)
class ScaledTraces:
    """Traces of two batch sizes, and through them of any other."""

    small: StepTrace
    large: StepTrace
    small_size: int
    large_size: int

    def __post_init__(self) -> None:
        first, second = self.small, self.large
        alike = (
            [op.name for op in first.ops] == [op.name for op in second.ops]
            and len(first.storages) == len(second.storages)
            and [h.storage for h in first.handles] == [h.storage for h in second.handles]
            and first.num_ticks == second.num_ticks
        )
        if not alike:
            raise CaptureError(
                f"the step runs other ops for {self.large_size} examples than for "
                f"{self.small_size}, so larger batches cannot be told from smaller ones."
            )

        sizes = [[storage.size_bytes for storage in trace.storages] for trace in (first, second)]
        if sizes[0] == sizes[1]:
            raise WorkloadError(
                f"the step takes the same memory at size {self.large_size} as at size "
                f"{self.small_size}: make_batch must return as many examples as it is asked for."
            )

    def at(self, size: int) -> StepTrace:
        """Return the trace of a step with `size` examples. Call only for sizes of 1 or more."""
        share = (size - self.small_size) / (self.large_size - self.small_size)

        def between(first: int, second: int) -> int:
            return max(0, round(first + (second - first) * share))

        storages = [
            _storage(a, between(a.size_bytes, b.size_bytes))
            for a, b in zip(self.small.storages, self.large.storages, strict=True)
        ]
        ops: list[Op] = [
            dataclasses.replace(
                a,
                flops=between(a.flops, b.flops),
                moved_bytes=between(a.moved_bytes, b.moved_bytes),
            )
            for a, b in zip(self.small.ops, self.large.ops, strict=True)
        ]
        return dataclasses.replace(self.small, storages=storages, ops=ops, handover=None)


def _storage(storage: Storage, size_bytes: int) -> Storage:
    made = copy.copy(storage)
    made.size_bytes = size_bytes
    return made
