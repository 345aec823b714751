"""What is known of each example beside its prediction: named slices and features, as columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remat.errors import WorkloadError
from remat.evaluation.data import num_examples, training_batches, validation_batches
from remat.evaluation.statistics import Mask
from remat.workload import Batch, Workload
from remat.workloads import where_raised

Column = NDArray[np.generic]

# Training examples that are read for comparison with the evaluation data.
MOST_TRAINING_EXAMPLES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Named slices as masks (N,), and features as columns (N,), over N examples."""

    num_examples: int
    slices: Mapping[str, Mask] = field(default_factory=dict)
    features: Mapping[str, Column] = field(default_factory=dict)


def evaluation_metadata(workload: Workload) -> Metadata:
    """Read slices and features of all evaluation data; no model is needed.

    So whatever is wrong with them is known before training.

    Raises
    ------
    WorkloadError: if a function raises, or gives anything but one value for each example.
    """
    if workload.eval_data is None or not (workload.slices or workload.features):
        return Metadata(num_examples=0)
    count = 0
    masks: dict[str, list[Column]] = {name: [] for name in workload.slices}
    columns: list[dict[str, Column]] = []
    for batch in validation_batches(workload):
        size = num_examples(batch)
        for name, function in workload.slices.items():
            masks[name].append(_mask(f"slice {name!r}", function, batch, size))
        columns.append(_columns(workload, batch, size))
        count += size
    return Metadata(
        num_examples=count,
        slices={name: np.concatenate(parts).astype(bool) for name, parts in masks.items()},
        features=_joined(columns),
    )


def training_features(
    workload: Workload, *, seed: int, most: int = MOST_TRAINING_EXAMPLES
) -> Mapping[str, Column]:
    """Read the features of the training data, in the order of its first epoch.

    Raises
    ------
    WorkloadError: as `evaluation_metadata`.
    """
    if workload.features is None:
        return {}
    return _joined(_until(workload, most, training_batches(workload, seed=seed, epoch=0)))


def _until(workload: Workload, most: int, batches: Iterable[Batch]) -> list[dict[str, Column]]:
    found: list[dict[str, Column]] = []
    count = 0
    for batch in batches:
        found.append(_columns(workload, batch, num_examples(batch)))
        count += num_examples(batch)
        if count >= most:
            break
    return found


def _mask(what: str, function: Any, batch: Batch, size: int) -> Column:
    mask = _column(what, _called(what, function, batch), size)
    if mask.dtype != np.bool_:
        raise WorkloadError(
            f"{what} must give true or false for each example, got values of type {mask.dtype}."
        )
    return mask


def _columns(workload: Workload, batch: Batch, size: int) -> dict[str, Column]:
    if workload.features is None:
        return {}
    given = _called("features", workload.features, batch)
    if not isinstance(given, Mapping):
        raise WorkloadError(
            f"features must return a mapping of name to column, got {type(given).__name__}."
        )
    return {str(name): _column(f"feature {name!r}", one, size) for name, one in given.items()}


def _called(what: str, function: Any, batch: Batch) -> Any:  # the user's function
    try:
        return function(batch)
    except Exception as error:  # the user's function may raise anything
        raise WorkloadError(f"{what} raised {where_raised(error)}.") from error


def _column(what: str, values: Any, size: int) -> Column:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float() if values.is_floating_point() else values.cpu()
    try:
        column = np.asarray(values)
    except ValueError:  # rows of several lengths
        column = np.empty(0)
    if column.shape != (size,):
        raise WorkloadError(
            f"{what} must give one value for each of the {size} examples of a batch, shape "
            f"[{size}], got shape {list(column.shape)}."
        )
    return column


def _joined(parts: list[dict[str, Column]]) -> dict[str, Column]:
    if not parts:
        return {}
    names = set(parts[0])
    if any(set(part) != names for part in parts):
        raise WorkloadError("features must return the same names for every batch.")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
