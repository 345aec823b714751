"""`remat verify`: does a plan change anything, and does it keep its promise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remat.cli.options import JsonOption, WorkloadArgument

NAME = "verify"
EXAMPLE = "Example: remat verify examples/digits_vit.py --plan plan.json"


def command(
    workload: WorkloadArgument,
    plan: Annotated[
        Path,
        typer.Option("--plan", show_default=False, help="The plan, as `remat plan -o` wrote it."),
    ],
    as_json: JsonOption = False,
) -> int:
    """Verify a plan: gradients, buffers and random state bit for bit, and the peak.

    Runs the step with and without the plan. Exit code 1 if anything differs that does not also
    differ between two runs without a plan, or if the measured peak is above the budget.
    """
    from remat.planner.records import Plan

    made = Plan.load(plan)  # before torch and the workload: a damaged file is known at once

    from remat.cli.inputs import inputs_of
    from remat.cli.progress import ProgressBars
    from remat.cli.screen import machine_output, out
    from remat.workloads import load_workload

    with machine_output(as_json) as write:
        with ProgressBars("verifying"):
            import remat

            inputs = inputs_of(load_workload(workload))
            proof = remat.verify(inputs.model, inputs.batch, made, **inputs.step)
        if as_json:
            write(proof.model_dump_json(indent=1))
        else:
            from remat.cli.tables import verification_view

            out().print(verification_view(inputs.name, proof))
    return 0 if proof.passed and proof.within_budget else 1
