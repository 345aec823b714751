"""`remat check`: is the checkpointing that is there already right, and is it worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remat.cli.options import BUDGET_HELP, JsonOption, WorkloadArgument, check_budget

NAME = "check"
EXAMPLE = "Example: remat check examples/digits_vit.py --fix plan.json"


def command(
    workload: WorkloadArgument,
    fix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Write a plan that replaces the model's own checkpointing: while it is applied, "
            "the model's calls of torch's checkpoint run plainly.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            show_default=False,
            help=f"With --fix. {BUDGET_HELP} The peak of the model as it stands, unless given.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Find hazards in a model's checkpointing, its author's own or its library's.

    Looks at one step: random numbers drawn anew, buffers updated twice, checkpointing that is on
    and does nothing, that saves nothing, or that is nested. Runs the step with and without that
    checkpointing and compares gradients, buffers and random state. Exit code 1 if anything is
    wrong or wasteful; notes do not count.
    """
    if budget is not None:
        if fix is None:
            raise typer.BadParameter("--budget is that of the plan which --fix FILE writes.")
        check_budget(budget)
    if fix is not None and fix.is_dir():
        raise typer.BadParameter(f"--fix {str(fix)!r} is a directory, expected a file.")

    from remat.cli.inputs import inputs_of
    from remat.cli.progress import ProgressBars
    from remat.cli.screen import machine_output, note
    from remat.workloads import load_workload

    with machine_output(as_json) as write:
        with ProgressBars("checking") as progress:
            import remat

            inputs = inputs_of(load_workload(workload))
            report = remat.check(inputs.model, inputs.batch, **inputs.step)
            if fix is not None:
                remat.replace_checkpointing(
                    inputs.model, inputs.batch, budget, progress=progress.by_share, **inputs.step
                ).save(fix)
        if fix is not None:
            note(f"plan written to {fix}")
        if as_json:
            write(report.model_dump_json(indent=1))
        else:
            from remat.cli.hazards import report_view
            from remat.cli.screen import out

            out().print(report_view(inputs.name, report))
    return 0 if report.is_clean else 1
