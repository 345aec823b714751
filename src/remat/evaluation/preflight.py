"""What can be known of an evaluation before hours of training: checked on its first batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from torch import nn

from remat.errors import WorkloadError
from remat.evaluation.checks import Subject
from remat.evaluation.data import model_device, to_device, validation_batches
from remat.evaluation.finding import require_finder
from remat.evaluation.metadata import Metadata, evaluation_metadata
from remat.evaluation.predictions import Task, as_pair, check_probabilities
from remat.evaluation.quality import measure_quality, require_metrics
from remat.evaluation.representation import check_population
from remat.evaluation.seeds import seeded
from remat.evaluation.statistics import require_scipy
from remat.trace.step import default_loss
from remat.workload import Batch, Workload


def require_packages(workload: Workload, num_seeds: int) -> None:
    """Fail before anything runs where a package is missing that this evaluation needs.

    Raises
    ------
    MissingPackageError: with the install command.
    """
    predicts = workload.predict is not None and workload.eval_data is not None
    if predicts:
        require_metrics()
    if predicts or num_seeds > 1:
        require_scipy()
    if predicts and workload.features is not None:
        require_finder()


def check_evaluation(subject: Subject, targets: Mapping[str, float]) -> Metadata:
    """Check the evaluation of a workload before training, and read what describes its examples.

    The untrained model predicts the first batch, so that a prediction of another form, scores that
    are no probabilities and targets for metrics that there will not be are found now; slices and
    features are read over all evaluation data. Random state and modes are left as they were.

    Raises
    ------
    WorkloadError: naming what is wrong, and what is expected.
    """
    workload = subject.workload
    known: set[str] = set()
    if workload.eval_data is not None:
        known = _metrics_of_first_batch(subject)
    for name, value in targets.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (name in known and is_number and math.isfinite(value)):
            listed = ", ".join(sorted(known)) or "none, as it has no eval_data"
            raise WorkloadError(
                f"target {name}={value!r}: expected a number for one of the workload's metrics "
                f"({listed})."
            )
    metadata = evaluation_metadata(workload)
    check_population(workload.population, metadata.features)
    return metadata


def _metrics_of_first_batch(subject: Subject) -> set[str]:
    workload, model = subject.workload, subject.model
    batch = next(iter(itertools.islice(validation_batches(workload), 1)))
    predict = workload.predict

    def checked(model: nn.Module, batch: Batch) -> object:
        assert predict is not None
        predicted = predict(model, batch)
        scores, _, task = as_pair(predicted)
        if task is not Task.VALUES:
            check_probabilities(scores)
        return predicted

    with seeded(subject.seed):
        found = measure_quality(
            model,
            [to_device(batch, model_device(model))],
            loss=workload.loss or default_loss,
            predict=None if predict is None else checked,
            epoch=0,
        )
    return set(found.metrics)
