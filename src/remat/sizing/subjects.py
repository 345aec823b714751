"""Subjects of a survey from one batch: more examples of it, or longer sequences."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from remat.errors import WorkloadError
from remat.sizing.scaling import num_examples, with_examples
from remat.sizing.search import LARGEST
from remat.sizing.survey import Subject
from remat.trace.standin import map_tensors
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike

# Any: batches are the user's own types.


def batch_subject(
    name: str,
    model: nn.Module,
    batch: Any,
    *,
    shards: int = 1,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> Subject:
    """Size the number of examples in a batch like the one given."""
    return Subject(
        name=name, model=model, make_batch=functools.partial(with_examples, batch),
        asked=num_examples(batch), loss=loss, optimizer=optimizer, shards=shards,
    )  # fmt: skip


def sequence_subject(
    name: str,
    model: nn.Module,
    batch: Any,
    *,
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
    return Subject(
        name=name, model=model, make_batch=with_tokens, asked=length, dimension="sequence",
        examples=lambda _tokens: number, small=max(4, length // 4), large=max(8, length // 2),
        most=longest if isinstance(longest, int) and longest > 0 else LARGEST,
        loss=loss, optimizer=optimizer, shards=shards,
    )  # fmt: skip
