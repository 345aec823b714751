"""What a model predicted over the evaluation data, kept once; every figure is drawn from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remat.errors import WorkloadError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Labels that do not count: what torch.nn.functional.cross_entropy leaves out.
IGNORED_LABEL = -100
# Probabilities of all classes are kept up to so many numbers; above, only what each row needs.
_MOST_KEPT = 2**23
_EXPECTED = (
    "Workload predict must return (probabilities, labels) of shapes (B, C), (B,) or (B, T, C), "
    "(B, T), or (B, C, H, W), (B, H, W), or (values, targets) of one shape"
)


class Task(enum.Enum):
    """What the rows of a prediction are."""

    CLASSES = "classification"
    TOKENS = "language modelling"
    PIXELS = "segmentation"
    VALUES = "regression"


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """One row for each example, token, pixel or value; rows of an example lie together.

    Shapes: R rows, C classes. Where the task is regression, `predicted` and `target` are values
    and the other columns are empty. Probabilities are divided by the sum of their row, in float64.

    example: (R,) which example the row belongs to, from 0 to `num_examples`.
    predicted, target: (R,) class or value.
    confidence: (R,) probability of the predicted class.
    likelihood: (R,) probability of the true class.
    square_sum: (R,) sum of the squared probabilities.
    probabilities: (R, C), or `None` where they were too many to keep.
    num_invalid: rows with a NaN, an infinite value, or probabilities that do not sum to one.
    """

    task: Task
    num_examples: int
    num_classes: int
    example: Integers
    predicted: Floats
    target: Floats
    confidence: Floats
    likelihood: Floats
    square_sum: Floats
    probabilities: Floats | None
    num_invalid: int = 0

    @property
    def is_right(self) -> Floats:
        """1 where the predicted class is the true one, else 0; shape (R,)."""
        right: Floats = (self.predicted == self.target).astype(np.float64)
        return right

    @property
    def has_one_row_each(self) -> bool:
        """Whether rows are examples, and so independent of each other."""
        return len(self.example) == self.num_examples

    def rows_of(self, examples: NDArray[np.bool_]) -> Predictions:
        """Keep the rows of some examples, given as a mask over the examples."""
        kept = examples[self.example]
        numbers = np.cumsum(examples) - 1
        return Predictions(
            task=self.task,
            num_examples=int(examples.sum()),
            num_classes=self.num_classes,
            example=numbers[self.example[kept]],
            predicted=self.predicted[kept],
            target=self.target[kept],
            confidence=_rows(self.confidence, kept),
            likelihood=_rows(self.likelihood, kept),
            square_sum=_rows(self.square_sum, kept),
            probabilities=None if self.probabilities is None else self.probabilities[kept],
        )


def _rows(column: Floats, kept: NDArray[np.bool_]) -> Floats:
    return column[kept] if len(column) else column


def as_pair(predicted: Any) -> tuple[torch.Tensor, torch.Tensor, Task]:  # Any: the user's own
    """Check the form of what `predict` returned, and bring it to the CPU, classes last.

    Scores of shape (B, C, H, W) come back as (B, H, W, C). Where (B, H, W, C) is meant and both
    readings fit, the axis whose scores sum to one is that of the classes.

    Raises
    ------
    WorkloadError: for another form, or labels that are no class.
    """
    if not (isinstance(predicted, (tuple, list)) and len(predicted) == 2):
        raise WorkloadError(f"{_EXPECTED}, got {type(predicted).__name__}.")
    try:
        scores, targets = (torch.as_tensor(part).detach().cpu() for part in predicted)
    except (TypeError, ValueError, RuntimeError):
        kinds = " and ".join(type(part).__name__ for part in predicted)
        raise WorkloadError(f"{_EXPECTED}, got {kinds}.") from None
    if scores.ndim == targets.ndim + 1 and scores.ndim in (2, 3, 4):
        scores = _classes_last(scores, targets)
        if scores.shape[:-1] == targets.shape and not targets.is_floating_point():
            _check_labels(scores, targets)
            task = {2: Task.CLASSES, 3: Task.TOKENS, 4: Task.PIXELS}[scores.ndim]
            return scores, targets, task
    if scores.shape == targets.shape and scores.ndim > 0:
        return scores, targets, Task.VALUES
    raise WorkloadError(f"{_EXPECTED}, got {list(scores.shape)} and {list(targets.shape)}.")


def check_probabilities(scores: torch.Tensor) -> None:
    """Refuse scores that are no probabilities: before training, on the first batch.

    Raises
    ------
    WorkloadError: with what the rows sum to, and what to do.
    """
    if not torch.isfinite(scores).all():
        raise WorkloadError(
            "Workload predict returned NaN or infinite probabilities for the first evaluation "
            "batch, before any training."
        )
    sums = scores.double().sum(dim=-1)
    if (scores < 0).any() or ((sums - 1).abs() > _tolerance(scores)).any():
        raise WorkloadError(
            "Workload predict must return probabilities: those of the first evaluation batch sum "
            f"to between {sums.min():.4g} and {sums.max():.4g}, the least is {scores.min():.4g}. "
            "Of logits, return logits.softmax(dim=-1); of segmentation logits, dim=1."
        )


@dataclass(slots=True)
class Collector:
    """Gathers predictions batch by batch, as small columns; one epoch, one collector."""

    _parts: list[dict[str, Floats]] = field(default_factory=list)
    _task: Task | None = None
    _num_classes: int = 0
    _num_examples: int = 0
    _num_kept: int = 0
    _num_invalid: int = 0

    def add(self, scores: torch.Tensor, targets: torch.Tensor, task: Task) -> None:
        """Take one batch in, as `as_pair` gives it.

        Raises
        ------
        WorkloadError: if it is of another kind than the batches before it.
        """
        num_classes = 0 if task is Task.VALUES else scores.shape[-1]
        if self._task is not None and (self._task, self._num_classes) != (task, num_classes):
            raise WorkloadError(
                f"Workload predict returned {task.value} with {num_classes} classes after "
                f"{self._task.value} with {self._num_classes}; every batch must be of one kind."
            )
        self._task, self._num_classes = task, num_classes
        count = scores.shape[0]
        rows_each = targets[0].numel() if count else 0
        example = np.repeat(np.arange(count), rows_each) + self._num_examples
        self._num_examples += count
        if task is Task.VALUES:
            part = {
                "predicted": scores.reshape(-1).double().numpy(),
                "target": targets.reshape(-1).double().numpy(),
            }
            valid = np.isfinite(part["predicted"]) & np.isfinite(part["target"])
        else:
            part, valid, counted = self._class_columns(scores, targets)
            example = example[counted]
        self._num_invalid += int((~valid).sum())
        part = {name: column[valid] for name, column in part.items()}
        self._parts.append(part | {"example": example[valid]})

    def _class_columns(
        self, scores: torch.Tensor, targets: torch.Tensor
    ) -> tuple[dict[str, Floats], NDArray[np.bool_], NDArray[np.bool_]]:
        """Give the columns of the rows that count, which of these are valid, and which count."""
        labels = targets.reshape(-1)
        counted = labels != IGNORED_LABEL
        rows, labels = scores.reshape(-1, scores.shape[-1])[counted].double(), labels[counted]
        sums = rows.sum(dim=-1)
        valid = ((sums - 1).abs() <= _tolerance(scores)) & (rows >= 0).all(dim=-1)  # False for NaN
        rows = rows / sums[:, None]
        confidence, predicted = rows.max(dim=-1)
        part = {
            "predicted": predicted.double().numpy(),
            "target": labels.double().numpy(),
            "confidence": confidence.numpy(),
            "likelihood": rows.gather(1, labels[:, None].long())[:, 0].numpy(),
            "square_sum": rows.square().sum(dim=-1).numpy(),
        }
        self._num_kept += rows.numel()
        if self._num_kept <= _MOST_KEPT:
            part["probabilities"] = rows.numpy()
        return part, valid.numpy(), counted.numpy()

    def finish(self) -> Predictions | None:
        """Give what was gathered; `None` without a batch."""
        if self._task is None:
            return None
        empty = np.empty(0)

        def column(name: str) -> Floats:
            return np.concatenate([part[name] for part in self._parts])

        is_values = self._task is Task.VALUES
        is_kept = not is_values and self._num_kept <= _MOST_KEPT
        return Predictions(
            task=self._task,
            num_examples=self._num_examples,
            num_classes=self._num_classes,
            example=column("example").astype(np.int64),
            predicted=column("predicted"),
            target=column("target"),
            confidence=empty if is_values else column("confidence"),
            likelihood=empty if is_values else column("likelihood"),
            square_sum=empty if is_values else column("square_sum"),
            probabilities=column("probabilities") if is_kept else None,
            num_invalid=self._num_invalid,
        )


def _classes_last(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if scores.ndim != 4:
        return scores
    moved = scores.movedim(1, -1)
    if moved.shape[:-1] != targets.shape:
        return scores
    if scores.shape[:-1] != targets.shape:
        return moved
    sums_last, sums_second = scores.double().sum(dim=-1), scores.double().sum(dim=1)
    return scores if (sums_last - 1).abs().max() < (sums_second - 1).abs().max() else moved


def _check_labels(scores: torch.Tensor, targets: torch.Tensor) -> None:
    if scores.shape[-1] == 1:
        raise WorkloadError(
            "Workload predict returned one class, in which every prediction is right. For two "
            "classes return both probabilities, torch.stack([1 - p, p], dim=-1)."
        )
    counted = targets[targets != IGNORED_LABEL]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < scores.shape[-1]:
        raise WorkloadError(
            f"Workload predict returned labels from {int(counted.min())} to {int(counted.max())} "
            f"with probabilities of {scores.shape[-1]} classes: labels must be from 0 to "
            f"{scores.shape[-1] - 1}, or {IGNORED_LABEL} where they do not count."
        )


def _tolerance(scores: torch.Tensor) -> float:
    """How far a row of probabilities may sum from one: half precision rounds each of them."""
    return 2e-2 if scores.dtype in (torch.float16, torch.bfloat16) else 1e-3
