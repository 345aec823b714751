"""The demo: the main job on the first example, in its own budget of two minutes on two cores."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from remat.errors import MissingPackageError, WorkloadError
from remat.evaluation.book import ProgressFunction
from remat.evaluation.evaluate import evaluate
from remat.evaluation.serving.options import ServingOptions
from remat.planner.policies import AllBlocks, EveryNth
from remat.runs.records import Run
from remat.runs.store import REPORT_FILE, claim_run_dir, new_run_dir
from remat.workloads import load_workload

_EXAMPLE = "digits_vit.py"


def run_demo(
    out: str | os.PathLike[str] | None = None, progress: ProgressFunction | None = None
) -> tuple[Run, Path]:
    """Train the digits example under two budgets, and return the run and its page.

    Arguments
    ---------
    out: folder of this run; default a new one in the run store.
    progress: called with stage, done and total.

    Raises
    ------
    MissingPackageError: if the data's package, scikit-learn, or one that draws is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("scikit-learn", "eval", "The demo's data") from error
    workload = load_workload(os.fspath(example_path(_EXAMPLE)))
    folder = new_run_dir(workload.name) if out is None else claim_run_dir(out)
    run = evaluate(
        workload,
        budgets=("60%", "40%"),
        policies=(AllBlocks(),),
        peers=(EveryNth(n=2),),
        front_points=5,
        warmup_rounds=1,
        serving=ServingOptions(seconds=1.0),
        out=folder,
        progress=progress,
    )
    return run, folder / REPORT_FILE


def example_path(name: str) -> Path:
    """Find an example: a wheel carries them in the package, a checkout has them at its root.

    They have one source, `examples/` of the repository, which the build puts into the wheel.
    """
    package = resources.files("remat")
    for folder in (package / "examples", package / ".." / ".." / "examples"):
        path = Path(str(folder / name))
        if path.is_file():
            return path.resolve()
    raise WorkloadError(f"the example {name!r} is not part of this installation of remat.")
