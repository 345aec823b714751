"""Quality of a form, overall and by slice, on the same examples as the model as trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from remat.errors import WorkloadError
from remat.evaluation.data import model_device, num_examples, to_device, validation_batches
from remat.evaluation.metadata import evaluation_metadata
from remat.evaluation.predictions import Collector, Predictions, Task
from remat.evaluation.quality import LossOf, measure_quality
from remat.evaluation.slices import slice_quality
from remat.evaluation.statistics import Mask
from remat.runs.evidence import SliceQuality
from remat.runs.reading import is_higher_better
from remat.runs.records import EpochQuality
from remat.trace.step import default_loss
from remat.workload import Batch, Workload

# Each class is a slice of its own where they are few: a quantized model may lose one of them.
_MOST_CLASSES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class FormQuality:
    """Metrics of one form, and the same by slice; both empty without evaluation data."""

    metrics: dict[str, float] = field(default_factory=dict)
    slices: tuple[SliceQuality, ...] = ()
    num_examples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What every form is measured on: the first `max_examples` of the data, in whole batches."""

    workload: Workload
    trained: nn.Module
    max_examples: int
    slices: Mapping[str, Mask]

    @classmethod
    def of(cls, workload: Workload, trained: nn.Module, max_examples: int) -> Yardstick:
        """Read the slices that the workload names."""
        slices = evaluation_metadata(workload).slices
        return cls(workload=workload, trained=trained, max_examples=max_examples, slices=slices)

    def measure(self, form: nn.Module) -> FormQuality:
        """Measure one form; nothing without evaluation data.

        Raises
        ------
        WorkloadError: if its predictions are NaN, infinite or no probabilities.
        """
        workload = self.workload
        if workload.eval_data is None:
            return FormQuality()
        try:
            found, predictions = self._measured(form, workload.loss or default_loss)
            metrics = dict(found.metrics)
        except Exception:
            if workload.predict is None:
                raise
            # An exported model may lack what only the loss asks of it, such as a pass of labels.
            found, predictions = self._measured(form, _no_loss)
            metrics = {name: value for name, value in found.metrics.items() if name != "loss"}
        if predictions is None:
            return FormQuality(metrics=metrics, num_examples=found.num_examples)
        if predictions.num_invalid:
            raise WorkloadError(
                f"{predictions.num_invalid:,} of its predictions are NaN, infinite or no "
                "probabilities."
            )
        masks = {
            name: np.asarray(mask, dtype=bool)[: predictions.num_examples]
            for name, mask in self.slices.items()
        }
        return FormQuality(
            metrics=metrics,
            slices=slice_quality(predictions, _classes(predictions) | masks),
            num_examples=found.num_examples,
        )

    def _measured(self, form: nn.Module, loss: LossOf) -> tuple[EpochQuality, Predictions | None]:
        device, collector = model_device(self.trained), Collector()
        found = measure_quality(
            form,
            (to_device(batch, device) for batch in self._batches()),
            loss=loss,
            predict=self.workload.predict,
            epoch=0,
            collector=collector,
        )
        return found, collector.finish()

    def _batches(self) -> Iterator[Batch]:
        seen = 0
        for batch in validation_batches(self.workload):
            yield batch
            seen += num_examples(batch)
            if seen >= self.max_examples:
                return


def _no_loss(_model: nn.Module, _batch: Batch) -> torch.Tensor:
    return torch.tensor(float("nan"))


def _classes(predictions: Predictions) -> dict[str, Mask]:
    """Return a slice for each class that occurs, where an example has one and they are few."""
    is_label = predictions.task is Task.CLASSES and predictions.has_one_row_each
    if not is_label or predictions.num_classes > _MOST_CLASSES:
        return {}
    occurring = np.unique(predictions.target)
    return {f"label = {label:.0f}": predictions.target == label for label in occurring}


def largest_slice_loss(form: FormQuality, trained: FormQuality) -> str:
    """Say on which slice a form lost most against the model as trained; empty where on none."""
    before = {one.name: one.quality for one in trained.slices}
    losses = []
    for one in form.slices:
        base = before.get(one.name)
        if base is None or one.quality is None:
            continue
        sign = 1 if is_higher_better(one.metric) else -1
        loss = sign * (base.value - one.quality.value)
        text = f"{one.metric} on {one.name!r} from {base.value:.4g} to {one.quality.value:.4g}"
        losses.append((loss, text))
    worst = max(losses, default=(0.0, ""))
    return f"Largest loss on a slice: {worst[1]}." if worst[0] > 0 else ""
