"""Shapes of batches: which sizes change from batch to batch, and the bucket that each falls in.

NOTE [ A bucket ]
Sizes that have been seen to change (sequence length, resolution, the examples of the last batch)
are rounded up, each by itself, so that sizes that are equal stay equal. A plan is made for the
rounded shape and serves every shape in the bucket: those between the bucket below and the rounded
one. A plan that recomputes nothing serves every smaller shape as well. Nothing is padded: each
batch runs as it is. That a smaller shape takes no more memory under the same decisions is not
believed but simulated, once for each shape, before it runs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from remat.errors import WorkloadError
from remat.planner.records import TensorSignature
from remat.trace.standin import map_tensors

# Any: batches are the user's own types.

Shapes = tuple[tuple[int, ...], ...]
_STEPS_PER_DOUBLING = 8


class Buckets:
    """Rounds sizes up: to the sizes that are given, or to eighths between powers of two.

    A size above all that are given is left as it is, as is every size where none is given.
    """

    def __init__(self, sizes: Sequence[int] | None = None) -> None:
        given = () if sizes is None else tuple(sizes)
        if any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in given):
            raise WorkloadError(f"buckets must be sizes, integers >= 1, or None; got {sizes!r}.")
        self._sizes = None if sizes is None else tuple(sorted(given))

    def above(self, size: int) -> int:
        """Return the largest size of the bucket that a size is in.

        Example
        -------
        >>> Buckets().above(100), Buckets().above(1000), Buckets((64, 512)).above(100)
        (104, 1024, 512)
        """
        if self._sizes is not None:
            place = bisect.bisect_left(self._sizes, size)
            return self._sizes[place] if place < len(self._sizes) else size
        power = 1 << max(size - 1, 0).bit_length()  # the power of two at or above
        step = max(1, power // (2 * _STEPS_PER_DOUBLING))
        return -(-size // step) * step


class Variation:
    """Which sizes of a batch have been seen to change, for each structure of batches."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._first: dict[object, Shapes] = {}
        self._changing: dict[object, set[tuple[int, int]]] = {}

    def bucket(self, signature: tuple[TensorSignature, ...]) -> Shapes:
        """Note a batch; return the largest shape of the bucket that it is in."""
        structure, shapes = structure_of(signature), shapes_of(signature)
        first = self._first.setdefault(structure, shapes)
        changing = self._changing.setdefault(structure, set())
        for index, (shape, known) in enumerate(zip(shapes, first, strict=True)):
            changing.update((index, dim) for dim, size in enumerate(shape) if size != known[dim])
        return tuple(
            tuple(
                self._buckets.above(size) if (index, dim) in changing else size
                for dim, size in enumerate(shape)
            )
            for index, shape in enumerate(shapes)
        )


def structure_of(signature: tuple[TensorSignature, ...]) -> tuple[tuple[str, str, int], ...]:
    """Return what batches that differ in sizes alone have in common."""
    return tuple((t.name, t.dtype, len(t.shape)) for t in signature)


def shapes_of(signature: tuple[TensorSignature, ...]) -> Shapes:
    """Return the shape of each tensor."""
    return tuple(t.shape for t in signature)


def is_within(shapes: Shapes, largest: Shapes) -> bool:
    """Whether no size is above that of another batch of the same structure."""
    return all(
        size <= most
        for shape, limits in zip(shapes, largest, strict=True)
        for size, most in zip(shape, limits, strict=True)
    )


def enlarged(batch: Any, shapes: Shapes) -> Any:
    """Return a batch with its tensors enlarged to `shapes` by repeating their last entries."""
    wanted = iter(shapes)

    def enlarge(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(next(wanted)):
            present = tensor.shape[dim]
            if present not in (0, size):
                index = torch.arange(size, device=tensor.device).clamp(max=present - 1)
                tensor = tensor.index_select(dim, index)
        return tensor

    return map_tensors(batch, enlarge)


def describe(shapes: Shapes) -> str:
    """Write shapes for people, each once: `4x128, 4`."""
    return ", ".join(dict.fromkeys("x".join(map(str, shape)) or "scalar" for shape in shapes))
