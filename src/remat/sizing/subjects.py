"""Subjects of a survey: more examples, longer sequences, larger images, or a deeper model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from remat.errors import WorkloadError
from remat.sizing.scaling import num_examples, with_examples
from remat.sizing.survey import Subject
from remat.trace.standin import map_tensors
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike

# Any: batches are the user's own types.

# Networks halve images up to five times.
_MOST_PIXELS_APART = 32
_LARGEST_SIDE = 2**14
_MOST_TIMES_DEEPER = 8


def batch_subject(
    name: str,
    model: nn.Module,
    batch: Any,
    *,
    with_layers: Callable[[int], nn.Module] | None = None,
    layers: int = 0,
    shards: int = 1,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> Subject:
    """Size the number of examples in a batch like the one given.

    `with_layers` builds the model with another number of layers than its own `layers`, where it
    can: a deep model is then traced by way of shallow ones.
    """
    return Subject(
        name=name, model=model, make_batch=functools.partial(with_examples, batch),
        asked=num_examples(batch), with_layers=with_layers, layers=layers, loss=loss,
        optimizer=optimizer, shards=shards,
    )  # fmt: skip


def sequence_subject(
    name: str,
    model: nn.Module,
    batch: Any,
    *,
    with_layers: Callable[[int], nn.Module] | None = None,
    layers: int = 0,
    shards: int = 1,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> Subject:
    """Size the tokens of each sequence in a batch like the one given.

    Raises
    ------
    WorkloadError: if the batch holds no integers of shape (sequences, tokens).
    """
    lengths: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and not tensor.is_floating_point():
            lengths.append(tensor.shape[1])
        return tensor

    map_tensors(batch, note)
    if not lengths or lengths[0] < 8:
        raise WorkloadError(
            "the batch holds no sequences: --sequence needs integers of shape (sequences, tokens), "
            "with 8 tokens or more."
        )
    length, number = lengths[0], num_examples(batch)

    def with_tokens(tokens: int) -> Any:
        def resized(tensor: Tensor) -> Tensor:
            if tensor.dim() < 2 or tensor.shape[1] != length:
                return tensor
            shape = (tensor.shape[0], tokens, *tensor.shape[2:])
            return torch.empty(shape, dtype=tensor.dtype, device="meta")

        return map_tensors(batch, resized)

    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    positions: dict[str, Any] = {}
    if isinstance(longest, int) and longest > 0:
        positions = {"most": longest, "most_of": "the model has no more positions"}
    return Subject(
        name=name, model=model, make_batch=with_tokens, asked=length, dimension="sequence",
        examples=lambda _tokens: number, small=max(4, length // 4), large=max(8, length // 2),
        with_layers=with_layers, layers=layers, loss=loss, optimizer=optimizer, shards=shards,
        **positions,
    )  # fmt: skip


def image_subject(
    name: str,
    model: nn.Module,
    batch: Any,
    *,
    make_model: Callable[[int], nn.Module] | None = None,
    shards: int = 1,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> Subject:
    """Size the side in pixels of square images in a batch like the one given.

    Sides are multiples of the largest power of two, at most 32, that divides the side given.
    `make_model` builds the model for a side, where its parameters depend on it.

    Raises
    ------
    WorkloadError: if the batch holds no square images (examples, channels, side, side).
    """
    sides: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3]:
            sides.append(tensor.shape[3])
        return tensor

    map_tensors(batch, note)
    if not sides:
        raise WorkloadError(
            "the batch holds no square images: --image-size needs a tensor of shape "
            "(examples, channels, side, side)."
        )
    side, number = sides[0], num_examples(batch)

    def with_side(wanted: int) -> Any:
        def resized(tensor: Tensor) -> Tensor:
            if tensor.dim() < 3 or tensor.shape[-2:] != (side, side):
                return tensor
            shape = (*tensor.shape[:-2], wanted, wanted)
            return torch.empty(shape, dtype=tensor.dtype, device="meta")

        return map_tensors(batch, resized)

    return Subject(
        name=name, model=model, make_batch=with_side, asked=side, dimension="image size",
        examples=lambda _side: number, unit=math.gcd(side, _MOST_PIXELS_APART), most=_LARGEST_SIDE,
        is_affine=False, make_model=make_model, loss=loss, optimizer=optimizer, shards=shards,
    )  # fmt: skip


def depth_subject(
    name: str,
    make_model: Callable[[int], nn.Module],
    batch: Any,
    *,
    asked: int,
    shards: int = 1,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> Subject:
    """Size the number of layers of a model, up to eight times as many as it has.

    `make_model` builds the model of a depth, such as on the meta device; `asked` is its own depth.
    """
    number = num_examples(batch)
    make_model = functools.lru_cache(maxsize=16)(make_model)
    return Subject(
        name=name, model=make_model(asked), make_batch=lambda _depth: batch, asked=asked,
        dimension="depth", examples=lambda _depth: number, most=_MOST_TIMES_DEEPER * asked,
        most_of=f"the search ends at {_MOST_TIMES_DEEPER} times the layers of the configuration",
        is_affine=False, make_model=make_model, with_layers=make_model, loss=loss,
        optimizer=optimizer, shards=shards,
    )  # fmt: skip
