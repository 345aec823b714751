"""Batches of a workload: the same ones, in the same order, for every variant."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from remat.errors import WorkloadError
from remat.workload import Batch, Workload
from remat.workloads import make_batches


def training_batches(workload: Workload, *, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield one epoch of training batches, shuffled by `seed` and `epoch` alone.

    A plan holds for one shape of batch, so the incomplete last batch of a dataset is left out,
    unless the dataset is smaller than one batch.

    Raises
    ------
    WorkloadError: if there is no batch, or reading the data raises.
    """
    drop_last = _num_examples_in(workload) >= workload.batch_size
    batches = make_batches(
        workload.train_data,
        workload.batch_size,
        seed=seed + epoch,
        shuffle=True,
        drop_last=drop_last,
    )
    return _not_empty(batches, workload, "train_data")


def validation_batches(workload: Workload) -> Iterator[Batch]:
    """Yield every validation batch in the order of the data; the errors are those of training."""
    batches = make_batches(workload.eval_data, workload.batch_size)
    return _not_empty(batches, workload, "eval_data")


def num_training_batches(workload: Workload) -> int | None:
    """Count the batches of an epoch; `None` for a function, which only running it can tell."""
    examples = _num_examples_in(workload)
    return max(examples // workload.batch_size, 1) if examples else None


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


def _num_examples_in(workload: Workload) -> int:
    """Length of a dataset of examples; 0 where the data come as finished batches."""
    data = workload.train_data
    is_dataset = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    # a class, such as a dataset's own that was not called, is refused where batches are made
    return len(data) if is_dataset and not isinstance(data, type) else 0


def _not_empty(batches: Iterator[Batch], workload: Workload, which: str) -> Iterator[Batch]:
    count = 0
    try:
        for batch in batches:
            count += 1
            yield batch
    except WorkloadError as error:
        if count:
            raise
        raise WorkloadError(f"Workload {workload.name!r}: {which}: {error}") from error
    if count == 0:
        raise WorkloadError(
            f"Workload {workload.name!r}: {which} holds no batch. Expected at least one example "
            "or, from a function, one batch; a function must give a new iterable at each call."
        )
