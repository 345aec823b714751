"""Validation quality: the loss always, and metrics by the kind of what the workload predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from remat.errors import MissingPackageError, WorkloadError
from remat.evaluation.data import num_examples
from remat.runs.records import EpochQuality
from remat.workload import Batch

LossOf = Callable[[nn.Module, Batch], torch.Tensor]
Predict = Callable[[nn.Module, Batch], Any]  # Any: checked by `_as_pair`


def require_metrics() -> None:
    """Fail now, not after training, where the package for quality metrics is missing.

    Raises
    ------
    MissingPackageError: with the install command.
    """
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("torchmetrics", "eval", "Measuring validation quality") from error


def measure_quality(
    model: nn.Module, batches: Iterable[Batch], *, loss: LossOf, predict: Predict | None, epoch: int
) -> EpochQuality:
    """Evaluate the model on the batches in eval mode; its training mode is restored.

    Metrics are `loss` (mean over examples) and, from `predict`: for probabilities (B, C) with
    labels (B,) accuracy, negative log-likelihood and calibration error; for probabilities
    (B, T, C) with labels (B, T) accuracy, negative log-likelihood and perplexity; for values and
    targets of one shape mean absolute error, root mean squared error and R².
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    total_loss, total = 0.0, 0
    metrics: _Metrics | None = None
    try:
        with torch.no_grad():
            for batch in batches:
                count = num_examples(batch)
                total_loss += float(loss(model, batch)) * count
                total += count
                if predict is not None:
                    scores, targets = _as_pair(predict(model, batch))
                    metrics = metrics or _metrics_for(scores, targets)
                    metrics.update(scores, targets)
    finally:
        for module, training in modes.items():
            module.training = training
    found = {"loss": total_loss / total} | (metrics.compute() if metrics is not None else {})
    return EpochQuality(epoch=epoch, num_examples=total, metrics=found)


class _Metrics:
    """Metrics of torchmetrics that see the predictions batch by batch."""

    def __init__(self, scores: torch.Tensor, targets: torch.Tensor) -> None:
        from torchmetrics import MeanMetric, regression
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

        self.is_sequence = scores.ndim == 3
        self.is_classes = scores.ndim == targets.ndim + 1 and not targets.is_floating_point()
        if self.is_classes:
            classes = scores.shape[-1]
            self.by_name: dict[str, Any] = {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "nll": MeanMetric(),
            }
            if not self.is_sequence:
                self.by_name["calibration_error"] = MulticlassCalibrationError(classes, n_bins=15)
        else:
            self.by_name = {
                "mae": regression.MeanAbsoluteError(),
                "rmse": regression.MeanSquaredError(squared=False),
                "r2": regression.R2Score(),
            }

    def update(self, scores: torch.Tensor, targets: torch.Tensor) -> None:
        if self.is_classes:
            scores, targets = scores.flatten(0, -2).float(), targets.flatten()
            chosen = scores.gather(1, targets[:, None].long())[:, 0]
            for name, metric in self.by_name.items():
                if name == "nll":
                    # a class that was ruled out gives the largest finite value, not infinity
                    metric.update(-chosen.clamp_min(torch.finfo(torch.float32).tiny).log())
                else:
                    metric.update(scores, targets)
        else:
            for metric in self.by_name.values():
                metric.update(scores.flatten().float(), targets.flatten().float())

    def compute(self) -> dict[str, float]:
        found = {name: float(metric.compute()) for name, metric in self.by_name.items()}
        if self.is_classes and self.is_sequence:
            found["perplexity"] = float(torch.tensor(found["nll"], dtype=torch.float64).exp())
        return found


def _metrics_for(scores: torch.Tensor, targets: torch.Tensor) -> _Metrics:
    require_metrics()
    return _Metrics(scores, targets)


def _as_pair(predicted: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Check what `predict` returned and bring it to the CPU."""
    expected = (
        "Workload predict must return (probabilities, labels) of shapes (B, C), (B,) or (B, T, C), "
        "(B, T), or (values, targets) of one shape"
    )
    if not (isinstance(predicted, (tuple, list)) and len(predicted) == 2):
        raise WorkloadError(f"{expected}, got {type(predicted).__name__}.")
    scores, targets = (torch.as_tensor(part).detach().cpu() for part in predicted)
    is_classes = scores.shape[:-1] == targets.shape and scores.ndim in (2, 3)
    if not (is_classes or scores.shape == targets.shape):
        raise WorkloadError(f"{expected}, got {list(scores.shape)} and {list(targets.shape)}.")
    return scores, targets
