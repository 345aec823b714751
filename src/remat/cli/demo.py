"""`remat demo`: the main job on real data that comes with an installed package."""

from __future__ import annotations

import os

from remat.cli.options import JsonOption, RunFolderOption

NAME = "demo"
EXAMPLE = "Example: remat demo --out remat-demo"


def command(
    out: RunFolderOption = None,
    as_json: JsonOption = False,
) -> int:
    """Train a small vision transformer on handwritten digits inside a memory budget.

    Takes under two minutes on two CPU cores and needs no network. Prints where the report lies.
    """
    # Before torch is loaded: the demo's kernels are small, and on a busy machine two threads that
    # wait for each other at each of them took 11 minutes where one took two.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from remat.cli.progress import ProgressBars
    from remat.cli.results import exit_code_of, show_run
    from remat.cli.screen import machine_output

    with machine_output(as_json) as write:
        with ProgressBars("preparing") as progress:
            from remat.evaluation.demo import run_demo

            run, page = run_demo(out=out, progress=progress)
        show_run(run, page.parent, write if as_json else None)
    return exit_code_of(run)
