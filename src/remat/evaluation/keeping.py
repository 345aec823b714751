"""What of a run is kept beside `run.json`: artifacts for good, predictions until it is finished."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import nn

from remat.evaluation.predictions import Predictions, Task
from remat.evaluation.weights import weights_of
from remat.files import write_bytes_atomically
from remat.report.markdown import render_markdown
from remat.runs.objects import OBJECTS_FOLDER, Objects
from remat.runs.records import Artifact, Run, Variant, VariantStatus
from remat.runs.store import METRICS_FILE, REPORT_FILE, store_root

_PREDICTIONS = "predictions"
_ARRAYS = (
    "example", "predicted", "target", "confidence", "likelihood", "square_sum", "probabilities",
)  # fmt: skip


def is_in_store(folder: Path) -> bool:
    """Say whether a run's folder lies in the store of runs, not in a place named by hand."""
    return folder.resolve().parent == store_root().resolve()


def objects_for(folder: Path) -> Objects:
    """Return where the artifacts of a new run go: beside it in a store, else into its own folder.

    A folder that was named by hand lies anywhere, and nothing is written beside it.
    """
    return Objects((folder.parent if is_in_store(folder) else folder) / OBJECTS_FOLDER)


def put_weights(model: nn.Module, objects: Objects, label: str) -> Artifact:
    """Keep parameters and buffers in safetensors; equal weights of several variants lie once."""
    objects.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=objects.folder, prefix=".weights.", suffix=".part", delete=False
    ) as file:
        part = Path(file.name)
    try:
        save_file(weights_of(model), part)
        return objects.put_file(
            part, name=f"weights/{label}.safetensors", media_type="application/x-safetensors"
        )
    finally:
        part.unlink(missing_ok=True)


def keep_files(run: Run, folder: Path, objects: Objects) -> tuple[Artifact, ...]:
    """Keep plans, series and page of a finished run, beside the weights that it holds already."""
    weights = [one for one in run.artifacts if one.name.startswith("weights/")]
    others = [
        objects.put(data, name=name, media_type=media_type)
        for name, data, media_type in _files(run, folder)
    ]
    return (*weights, *others)


def _files(run: Run, folder: Path) -> Iterator[tuple[str, bytes, str]]:
    for variant in run.variants:
        if variant.plan is not None:
            plan = variant.plan.model_dump_json(indent=1).encode() + b"\n"
            yield f"plans/{variant.label}.json", plan, "application/json"
    yield "report.md", render_markdown(run).encode(), "text/markdown"
    for name, media_type in ((METRICS_FILE, "text/csv"), (REPORT_FILE, "text/html")):
        if (folder / name).is_file():
            yield name, (folder / name).read_bytes(), media_type


def keep_predictions(folder: Path, variant: Variant, predictions: Predictions) -> None:
    """Keep what a trained variant predicts until evidence is drawn, for a run that is resumed.

    Under the digest of the weights: equal models predict the same, and it is written once.
    """
    target = folder / _PREDICTIONS / f"{variant.weights_sha256}.npz"
    if target.exists():
        return
    facts = {"task": predictions.task.value} | {
        name: getattr(predictions, name) for name in ("num_examples", "num_classes", "num_invalid")
    }
    arrays = {name: getattr(predictions, name) for name in _ARRAYS}
    held = {name: array for name, array in arrays.items() if array is not None}
    data = io.BytesIO()
    np.savez(data, facts=np.array(json.dumps(facts)), **held)
    write_bytes_atomically(target, data.getvalue())


def kept_predictions(folder: Path, variants: Sequence[Variant]) -> dict[str, Predictions]:
    """Return what variants that were trained before the run was interrupted predict, by label."""
    found: dict[str, Predictions] = {}
    for variant in variants:
        path = folder / _PREDICTIONS / f"{variant.weights_sha256}.npz"
        if variant.status is not VariantStatus.FINISHED or not path.is_file():
            continue
        with np.load(path, allow_pickle=False) as data:
            facts = json.loads(str(data["facts"]))
            # Any: the dictionary holds every field of the record, by name
            arrays: dict[str, Any] = {name: data.get(name, None) for name in _ARRAYS}
        found[variant.label] = Predictions(task=Task(facts.pop("task")), **facts, **arrays)
    return found


def drop_predictions(folder: Path) -> None:
    """Remove the kept predictions: evidence has been drawn from them."""
    shutil.rmtree(folder / _PREDICTIONS, ignore_errors=True)
