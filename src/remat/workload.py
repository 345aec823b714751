"""Workloads: a model with the data, loss and metrics that one training run consumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from remat.errors import WorkloadError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Any: batches, examples and predictions are the user's own types.
Batch = Any
LossFunction = Callable[["nn.Module", Batch], "torch.Tensor"]
OptimizerFactory = Callable[[Iterable["nn.Parameter"]], "torch.optim.Optimizer"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What `remat evaluate` trains.

    Arguments
    ---------
    model: `() -> nn.Module`, called anew for every run.
    train_data: a map-style dataset of examples, or `() -> iterable of batches`.
    eval_data: the same, for validation.
    batch_size: examples per batch where a dataset is given.
    loss: `(model, batch) -> scalar tensor`; `None` takes the loss from the model's output.
    predict: `(model, batch) -> (probabilities (B, C), labels (B,))`, or values and targets of shape
        (B,), for quality metrics; `None` leaves quality out.
    optimizer: `(parameters) -> torch.optim.Optimizer`.
    epochs, seed: how long, and from which random state.
    slices: name -> `(example metadata or batch) -> bool mask`, for slice metrics.
    """

    name: str
    model: Callable[[], nn.Module]
    train_data: Any
    eval_data: Any = None
    batch_size: int = 32
    loss: LossFunction | None = None
    predict: Callable[[nn.Module, Batch], Any] | None = None
    optimizer: OptimizerFactory | None = None
    epochs: int = 1
    seed: int = 0
    slices: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise WorkloadError(f"Workload name must be text that is not empty, got {self.name!r}.")
        if not callable(self.model):
            raise WorkloadError(
                f"Workload {self.name!r}: model must be a function that builds the model, "
                f"got {type(self.model).__name__}. Pass `lambda: MyModel(...)`."
            )
        for label, value, least in (("batch_size", self.batch_size, 1), ("epochs", self.epochs, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise WorkloadError(
                    f"Workload {self.name!r}: {label} must be an integer >= {least}, got {value!r}."
                )
