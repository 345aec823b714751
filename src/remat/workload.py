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
    predict: `(model, batch) -> (probabilities, labels)` of shapes (B, C) and (B,), for sequences
        (B, T, C) and (B, T), for segmentation (B, C, H, W) and (B, H, W); or values and targets of
        one shape. Labels of -100 do not count. `None` leaves quality out.
    optimizer: `(parameters) -> torch.optim.Optimizer`.
    epochs, seed: how long, and from which random state.
    slices: name -> `(batch) -> bool mask (B,)`: parts of the evaluation data to measure by
        themselves.
    features: `(batch) -> {name: column (B,)}` of numbers, truth values or text that describe each
        example, such as the brightness of an image: slices where the model is worse are searched
        over them, and the evaluation data are compared with the training data by them. Called on
        batches of both.
    population: feature -> group -> share, the population that the model is meant for, such as
        `{"region": {"north": 0.4, "south": 0.6}}`; features without one are compared with the
        training data.
    targets: metric -> value that training should reach, such as `{"accuracy": 0.9}`; the time
        until then is recorded.
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
    slices: Mapping[str, Callable[[Batch], Any]] = field(default_factory=dict)
    features: Callable[[Batch], Mapping[str, Any]] | None = None
    population: Mapping[str, Mapping[Any, float]] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)

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
        for label in ("loss", "predict", "optimizer", "features"):
            value = getattr(self, label)
            if value is not None and not callable(value):
                raise WorkloadError(
                    f"Workload {self.name!r}: {label} must be a function or None, "
                    f"got {type(value).__name__}."
                )
        for label, what, is_right in (
            ("slices", "names to functions (batch) -> mask", callable),
            ("population", "features to {group: share}", _is_mapping),
            ("targets", "metrics to numbers", lambda _: True),
        ):
            value = getattr(self, label)
            if not _is_mapping(value) or not all(
                isinstance(key, str) and is_right(item) for key, item in value.items()
            ):
                raise WorkloadError(
                    f"Workload {self.name!r}: {label} must map {what}, got {value!r:.60}."
                )
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise WorkloadError(
                f"Workload {self.name!r}: seed must be an integer from 0 to 2**63 - 1, "
                f"got {self.seed!r}."
            )


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)
