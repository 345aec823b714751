"""Validation quality: the loss always, and metrics by the kind of what the workload predicts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from remat.errors import MissingPackageError, RematError, WorkloadError
from remat.evaluation.calibration import TINY, calibration
from remat.evaluation.data import num_examples
from remat.evaluation.predictions import IGNORED_LABEL, Collector, Predictions, Task, as_pair
from remat.runs.records import EpochQuality
from remat.trace.step import first_line
from remat.workload import Batch

# The five best classes say something only where there are many more.
_TOP_OF = 10
LossOf = Callable[[nn.Module, Batch], torch.Tensor]
Predict = Callable[[nn.Module, Batch], Any]  # Any: checked by `as_pair`


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
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: LossOf,
    predict: Predict | None,
    epoch: int,
    collector: Collector | None = None,
) -> EpochQuality:
    """Evaluate the model on the batches in eval mode; its training mode is restored.

    Metrics are `loss` (mean over examples) and, from `predict`, by the kind of the workload:

    - classification, probabilities (B, C) and labels (B,): accuracy; balanced accuracy (mean
      recall of the classes that occur); macro F1; top-5 accuracy from eleven classes on; AUROC of
      two classes; negative log-likelihood; expected calibration error.
    - language modelling, (B, T, C) and (B, T): accuracy, negative log-likelihood and perplexity
      per token.
    - segmentation, (B, C, H, W) and (B, H, W): pixel accuracy, mean IoU and Dice over the classes
      that occur, all pixels together; negative log-likelihood.
    - regression, values and targets of one shape: mean absolute error, root mean squared error, R².

    Where a prediction is NaN or no probability, there is no metric but the loss, and `collector`,
    which keeps all predictions, counts how many there were.

    Raises
    ------
    WorkloadError: if `predict` returns anything else, if it or the loss raises, or without any
        example.
    MissingPackageError: without torchmetrics.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    total_loss, total = 0.0, 0
    kept = Collector() if collector is None else collector
    metrics: _Metrics | None = None
    try:
        with torch.no_grad():
            for batch in batches:
                count = num_examples(batch)
                with _explained("loss"):
                    total_loss += float(loss(model, batch)) * count
                total += count
                if predict is not None:
                    with _explained("predict"):
                        predicted = predict(model, batch)
                    scores, targets, task = as_pair(predicted)
                    kept.add(scores, targets, task)
                    metrics = metrics or _metrics_for(task, scores.shape[-1])
                    metrics.update(scores, targets)
    finally:
        for module, training in modes.items():
            module.training = training
    if not total:
        raise WorkloadError("the batches of eval_data hold no example: expected at least one.")
    found = {"loss": total_loss / total}
    predictions = kept.finish()
    if metrics is not None and predictions is not None and predictions.num_invalid == 0:
        found |= metrics.compute(predictions)
    return EpochQuality(epoch=epoch, num_examples=total, metrics=found)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the user's function raises into an error that says on what it failed."""
    try:
        yield
    except (RematError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise WorkloadError(
            f"Workload {what} failed on a batch of eval_data: {type(error).__name__}: "
            f"{first_line(error)}. It is called as {what}(model, batch), with batches like those "
            "of train_data."
        ) from error


class _Metrics:
    """Metrics of torchmetrics that see the predictions batch by batch, in float64."""

    def __init__(self, task: Task, num_classes: int) -> None:
        from torchmetrics import regression
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        self.task = task
        self.by_name: dict[str, Any] = {}
        self.confusion: Any = None  # torchmetrics has no types
        if task is Task.VALUES:
            self.by_name = {
                "mae": regression.MeanAbsoluteError(),
                "rmse": regression.MeanSquaredError(squared=False),
                "r2": regression.R2Score(),
            }
        elif task is not Task.TOKENS:  # a vocabulary squared would be too large
            self.confusion = MulticlassConfusionMatrix(num_classes)
        if task is Task.CLASSES and num_classes > _TOP_OF:
            self.by_name["top_5_accuracy"] = MulticlassAccuracy(
                num_classes, average="micro", top_k=5
            )
        for metric in self.by_name.values():
            metric.set_dtype(torch.float64)

    def update(self, scores: torch.Tensor, targets: torch.Tensor) -> None:
        if self.task is Task.VALUES:
            scores, targets = scores.flatten().double(), targets.flatten().double()
        else:
            scores, targets = scores.flatten(0, -2), targets.flatten()
            counted = targets != IGNORED_LABEL
            scores, targets = scores[counted], targets[counted]
        finite = torch.isfinite(scores) if scores.ndim == 1 else torch.isfinite(scores).all(dim=1)
        if not finite.all():
            return  # the collector counts it, and no metric is given
        for metric in self.by_name.values():
            metric.update(scores, targets)
        if self.confusion is not None:
            self.confusion.update(scores.argmax(dim=-1), targets)

    def compute(self, predictions: Predictions) -> dict[str, float]:
        found = {name: float(metric.compute()) for name, metric in self.by_name.items()}
        if self.task is Task.VALUES:
            return found
        if len(predictions.target) == 0:  # every label says that it does not count
            return {}
        accuracy = {"accuracy": float(predictions.is_right.mean())}
        found = accuracy | found | _from_confusion(self.confusion, self.task)
        likelihood = torch.from_numpy(predictions.likelihood)
        found["nll"] = float(-likelihood.clamp_min(TINY).log().mean())
        if self.task is Task.TOKENS:
            found["perplexity"] = float(torch.tensor(found["nll"], dtype=torch.float64).exp())
        if self.task is Task.CLASSES:
            found["calibration_error"] = calibration(predictions).expected_error
            found |= _area(predictions)
        return found


def _from_confusion(confusion: Any, task: Task) -> dict[str, float]:
    """Draw the macro averages from the counts (true class, predicted class).

    torchmetrics' own macro averages count a class that was predicted and does not occur as one of
    recall zero, and are in float32.
    """
    if confusion is None:
        return {}
    counts = confusion.compute().double()
    both, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    seen = (true + predicted) > 0
    overlap = float((2 * both / (true + predicted))[seen].mean())
    if task is Task.PIXELS:
        union = (both / (true + predicted - both))[seen].mean()
        return {"mean_iou": float(union), "dice": overlap}
    return {"balanced_accuracy": float((both / true)[true > 0].mean()), "macro_f1": overlap}


def _area(predictions: Predictions) -> dict[str, float]:
    """Area under the ROC curve of two classes; none where only one of them occurs."""
    is_second = predictions.target == 1
    if predictions.num_classes != 2 or is_second.all() or not is_second.any():
        return {}
    from sklearn.metrics import roc_auc_score  # torchmetrics' is in float32, 1e-8 off

    second = np.where(is_second, predictions.likelihood, 1 - predictions.likelihood)
    return {"auroc": float(roc_auc_score(is_second, second))}


def _metrics_for(task: Task, num_classes: int) -> _Metrics:
    require_metrics()
    return _Metrics(task, num_classes)
