"""Batches of a workload: the same ones, in the same order, for every variant."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from remat.workload import Batch, Workload
from remat.workloads import num_examples_in, workload_batches


def training_batches(workload: Workload, *, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield one epoch of training batches, shuffled by `seed` and `epoch` alone.

    A plan holds for one shape of batch, so the incomplete last batch of a dataset is left out,
    unless the dataset is smaller than one batch.

    Raises
    ------
    WorkloadError: if there is no batch, or reading the data raises.
    """
    return workload_batches(workload, "train_data", seed=seed + epoch, shuffle=True, drop_last=True)


def validation_batches(workload: Workload) -> Iterator[Batch]:
    """Yield every validation batch in the order of the data; the errors are those of training."""
    return workload_batches(workload, "eval_data")


def num_training_batches(workload: Workload) -> int | None:
    """Count the batches of an epoch; `None` for a function, which only running it can tell."""
    count = num_examples_in(workload.train_data)
    return None if count is None else max(count // workload.batch_size, 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a nested batch to `device`; everything else passes through."""
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def num_examples(batch: Batch) -> int:
    """Count the examples of a batch by the first dimension of its first tensor; 1 without any."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    return 1


def describe_batch(batch: Batch) -> tuple[str, ...]:
    """Write shape and dtype of each tensor of a batch, such as `float32[64, 1, 8, 8]`."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    return tuple(f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" for leaf in leaves)
