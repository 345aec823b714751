"""Runs handed to other trackers, MLflow and TensorBoard: both optional, and only on files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from remat.errors import DataError, MissingPackageError
from remat.runs.growth import plan_id
from remat.runs.records import Run, Variant
from remat.runs.series import series_of

# Any: both packages come without types.
_KEY = "remat.key"
_BATCH = 500  # metrics in one call; MLflow takes up to 1,000


def to_mlflow(runs: Sequence[Run], database: Path) -> int:
    """Write each variant as a run of MLflow into an SQLite database; return how many were new.

    A variant that is there already is left as it is. Artifacts of MLflow's own would lie beside the
    database; none is written.

    Raises
    ------
    MissingPackageError: with the install command, if MLflow is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise MissingPackageError("mlflow-skinny", "track", "Exporting to MLflow") from error
    place = database.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{place}")
    return sum(_put_variant(client, run, v, place) for run in runs for v in run.variants)


def to_tensorboard(runs: Sequence[Run], folder: Path) -> int:
    """Write the series of each variant as event files, `RUN/VARIANT` below a folder; count them.

    Raises
    ------
    MissingPackageError: with the install command, if TensorBoard is not installed.
    DataError: if a run is there already, as its events would show twice.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise MissingPackageError("tensorboard", "track", "Exporting to TensorBoard") from error
    there = [run.id for run in runs if (folder / run.id).exists()]
    if there:
        raise DataError(
            f"{os.fspath(folder / there[0])!r} is there already: its events would show twice. "
            "Remove it, or name another folder."
        )
    num_written = 0
    for run in runs:
        moment = datetime.fromisoformat(run.created).timestamp()
        for variant in run.variants:
            series = list(series_of(variant))
            if not series:
                continue
            writer = EventFileWriter(str(folder / run.id / _slug(variant.label)))
            for name, index, value in series:
                scalar = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                writer.add_event(Event(wall_time=moment, step=index, summary=scalar))
            writer.close()
            num_written += 1
    return num_written


def _put_variant(client: Any, run: Run, variant: Variant, database: Path) -> bool:
    from mlflow.entities import Metric, Param, RunTag

    experiment = _experiment(client, run.name, database)
    key = f"{run.id}/{variant.label}"
    if client.search_runs([experiment], filter_string=f"tags.`{_KEY}` = '{_quoted(key)}'"):
        return False
    moment = int(datetime.fromisoformat(run.created).timestamp() * 1000)
    begun = client.create_run(experiment, start_time=moment, run_name=f"{run.id} {variant.label}")
    name = begun.info.run_id
    metrics = [Metric(series, value, moment, index) for series, index, value in series_of(variant)]
    metrics += [Metric(figure, value, moment, 0) for figure, value in _figures(variant)]
    params = [Param(field, str(value)[:500]) for field, value in _params(run, variant)]
    tags = [RunTag(_KEY, key), RunTag("remat.verdict", variant.verdict.value)]
    client.log_batch(name, params=params, tags=tags)
    for first in range(0, len(metrics), _BATCH):
        client.log_batch(name, metrics=metrics[first : first + _BATCH])
    client.set_terminated(name, "FINISHED", end_time=moment)
    return True


def _experiment(client: Any, name: str, database: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    place = (database.parent / f"{database.stem}-artifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=place))


def _figures(variant: Variant) -> Iterator[tuple[str, float]]:
    for name in ("predicted_peak_bytes", "measured_peak_bytes", "budget_bytes", "train_seconds"):
        value = getattr(variant, name)
        if value is not None:
            yield name, float(value)
    if variant.step_times is not None:
        yield "median_step_seconds", variant.step_times.median_seconds


def _params(run: Run, variant: Variant) -> Iterator[tuple[str, object]]:
    yield from (("variant", variant.label), ("kind", variant.kind.value), ("seed", run.seed))
    yield from (("epochs", run.epochs), ("batch_size", run.batch_size))
    yield from (("device", run.environment.device), ("num_parameters", run.num_parameters))
    if variant.plan is not None:
        yield "plan", plan_id(variant.plan)


def _slug(label: str) -> str:
    """Write a label as a folder, so that no two of a run share one."""
    return re.sub(r"[^\w.%+-]+", "-", label)


def _quoted(text: str) -> str:
    return text.replace("'", "''")
