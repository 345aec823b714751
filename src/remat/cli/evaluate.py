"""`remat evaluate`: the main job, training under several plans side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from remat.cli.options import (
    BUDGET_HELP,
    JsonOption,
    RunFolderOption,
    WorkloadArgument,
    check_budget,
)

NAME = "evaluate"
EXAMPLE = "Example: remat evaluate examples/digits_vit.py --budget 80% --budget 60%"


def command(
    workload: WorkloadArgument,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", "-b", show_default=False, help=f"{BUDGET_HELP} May be given several times."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="Epochs to train; the workload's own, unless given.",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="End each training after N steps; all of its epochs, unless given.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            show_default=False,
            help="Seed of weights, "
            "shuffling and dropout, the same for every plan; the workload's own, unless given.",
        ),
    ] = None,
    out: RunFolderOption = None,
    as_json: JsonOption = False,
) -> int:
    """Train a workload under several plans, prove that nothing changed, and see what it cost.

    Trains with the same seeds under no plan, with all blocks recomputed, and under a plan for each
    budget. Writes run.json and report.html. Exit code 1 if a check failed, 3 if no plan reached a
    budget.
    """
    budgets = [check_budget(one) for one in budget or ()]

    from remat.cli.progress import ProgressBars
    from remat.cli.results import exit_code_of, show_run
    from remat.cli.screen import machine_output
    from remat.runs.store import new_run_dir
    from remat.workloads import load_workload

    with machine_output(as_json) as write:
        loaded = load_workload(workload)
        folder = new_run_dir(loaded.name) if out is None else out
        with ProgressBars("preparing") as progress:
            import remat

            chosen: dict[str, Any] = {"budgets": budgets} if budgets else {}  # else its own default
            run = remat.evaluate(
                loaded,
                **chosen,
                out=folder,
                seed=seed,
                epochs=epochs,
                max_steps=max_steps,
                progress=progress,
            )
        show_run(run, folder, write if as_json else None)
    return exit_code_of(run)
