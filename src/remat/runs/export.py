"""Runs as one file to give away: an archive that is a store itself, or a table for spreadsheets."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from remat.errors import DataError
from remat.files import write_atomically
from remat.runs.entries import RUN_FILE
from remat.runs.objects import OBJECTS_FOLDER, objects_of
from remat.runs.records import EpochQuality, Run

_COLUMNS = (
    "run", "name", "created", "status", "passed", "seed", "epochs", "batch_size", "variant", "kind",
    "verdict", "budget_bytes", "predicted_peak_bytes", "measured_peak_bytes",
    "median_step_seconds", "iqr_step_seconds", "train_seconds", "losses_identical",
    "weights_identical", "git_commit", "torch", "device",
)  # fmt: skip


def export_runs(folders: Sequence[Path], target: Path) -> Path:
    """Write runs to one file whose ending says what it is: `.zip`, `.tar.gz` or `.csv`.

    An archive holds each run's folder, with the artifacts that it references inside: unpacked, it
    is a store. A table has one row for each variant. The file is whole or not there at all.

    Raises
    ------
    DataError: for another ending.
    RunError, PlanFileError: if a run or an artifact that it references is missing or damaged.
    """
    for ending, write in _WRITERS.items():
        if target.name.endswith(ending):
            write(folders, target)
            return target
    raise DataError(
        f"{os.fspath(target)!r}: the name of an export ends in {', '.join(_WRITERS)}; "
        "other endings are not known."
    )


def runs_csv(runs: Sequence[Run]) -> str:
    """Write one row for each variant of each run; final metrics are columns of their own."""
    metrics = sorted({name for run in runs for v in run.variants for name in _final(v.quality)})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *metrics])
    for run in runs:
        for variant in run.variants:
            times, final = variant.step_times, _final(variant.quality)
            writer.writerow(
                [
                    run.id, run.name, run.created, run.status.value, run.passed, run.seed,
                    run.epochs, run.batch_size, variant.label, variant.kind.value,
                    variant.verdict.value, variant.budget_bytes, variant.predicted_peak_bytes,
                    variant.measured_peak_bytes, times and times.median_seconds,
                    times and times.iqr_seconds, variant.train_seconds, variant.losses_identical,
                    variant.weights_identical, run.environment.git_commit,
                    run.environment.versions.get("torch"), run.environment.device,
                    *(final.get(name) for name in metrics),
                ]
            )  # fmt: skip
    return text.getvalue()


def _final(quality: Sequence[EpochQuality]) -> Mapping[str, float]:
    return quality[-1].metrics if quality else {}


def _contents(folders: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every file of every run; the artifacts are checked as they pass."""
    for folder in folders:
        name = folder.resolve().name
        artifacts = Run.load(folder / RUN_FILE).artifacts
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and inside.parts[0] != OBJECTS_FOLDER and path.suffix != ".part":
                yield f"{name}/{inside.as_posix()}", path.read_bytes()
        for digest in sorted({artifact.sha256 for artifact in artifacts}):
            yield f"{name}/{OBJECTS_FOLDER}/{digest}", objects_of(folder).read(digest)


def _write_zip(folders: Sequence[Path], target: Path) -> None:
    with _part(target) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in _contents(folders):
            archive.writestr(name, data)


def _write_tar(folders: Sequence[Path], target: Path) -> None:
    with _part(target) as part, tarfile.open(part, "w:gz") as archive:
        for name, data in _contents(folders):
            facts = tarfile.TarInfo(name)
            facts.size, facts.mode = len(data), 0o644
            archive.addfile(facts, io.BytesIO(data))


def _write_csv(folders: Sequence[Path], target: Path) -> None:
    write_atomically(target, runs_csv([Run.load(folder / RUN_FILE) for folder in folders]))


@contextlib.contextmanager
def _part(target: Path) -> Iterator[Path]:
    """Give a temporary name beside the target; it takes the target's place when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".export.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


_WRITERS: Final[Mapping[str, Callable[[Sequence[Path], Path], None]]] = MappingProxyType(
    {".zip": _write_zip, ".tar.gz": _write_tar, ".csv": _write_csv}
)
