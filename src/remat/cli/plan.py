"""`remat plan`: what to recompute so that a training step stays within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remat.cli.options import (
    BUDGET_HELP,
    HOST_BUDGET_HELP,
    AllocConfOption,
    BatchOption,
    DeviceFileOption,
    HfConfigOption,
    JsonOption,
    OptionalWorkloadArgument,
    check_budget,
    check_host_budget,
    device_with,
)

if TYPE_CHECKING:
    from remat.planner.records import Plan

# Any: a memory snapshot is nested dicts and lists.

NAME = "plan"
EXAMPLE = "Example: remat plan examples/digits_vit.py --budget 60% -o plan.json"
_TIMELINES = (".html", ".json", ".pickle")  # forms of --memory-timeline
_FRONT_POINTS = 6  # of the sketch in the terminal, where nothing else is asked for


def command(
    workload: OptionalWorkloadArgument = None,
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", show_default=False, help=BUDGET_HELP)
    ] = None,
    host_budget: Annotated[
        str | None, typer.Option("--host-budget", show_default=False, help=HOST_BUDGET_HELP)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            show_default=False,
            help="Plan for this device of the table, such as H100-80GB, which need not be here: "
            "its kernels, its seconds and, on CUDA, what the caching allocator reserves. Without "
            "--budget, all of its memory is the budget.",
        ),
    ] = None,
    device_file: DeviceFileOption = None,
    alloc_conf: AllocConfOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default=False, help="Write the plan to this file."),
    ] = None,
    frontier: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            show_default=False,
            help=f"Plan N budgets for the Pareto front. {_FRONT_POINTS} for the sketch in the "
            "terminal, unless given; 0 leaves it out. With --json only where given.",
        ),
    ] = None,
    chunks: Annotated[
        bool | None,
        typer.Option(
            "--chunks/--no-chunks",
            show_default=False,
            help="Run a projection to classes and its loss, and MLPs, in slices wherever that is "
            "cheaper, or never. Unless given: where the budget cannot be met otherwise. Gradients "
            "then differ in rounding.",
        ),
    ] = None,
    hf_config: HfConfigOption = None,
    batch: BatchOption = None,
    memory_timeline: Annotated[
        Path | None,
        typer.Option(
            "--memory-timeline",
            metavar="FILE",
            show_default=False,
            help="Write the planned step's allocations: FILE.html as a page of blocks by kind, "
            "FILE.json as a PyTorch memory snapshot, or FILE.pickle as one for "
            "pytorch.org/memory_viz, which reads nothing else.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Plan what to recompute so that a training step stays within a budget.

    The model is left as it is, and no real activation is allocated. Prints the plan and a sketch of
    the Pareto front: peak memory against what is computed twice.
    """
    if device is None and (device_file is not None or alloc_conf is not None):
        raise typer.BadParameter("--device-file and --alloc-conf need --device, whose they are.")
    row = None if device is None else device_with(device, device_file, alloc_conf)
    if row is not None and row.torch_type != "cuda" and alloc_conf is not None:
        raise typer.BadParameter(f"--alloc-conf: {row.name!r} has no caching allocator of CUDA's.")
    if row is not None and budget is None and not frontier and row.kind != "cpu":
        budget = str(row.available_bytes)
    if budget is None and (output is not None or memory_timeline is not None or not frontier):
        raise typer.BadParameter("give a --budget, or --frontier N for the Pareto front alone.")
    if memory_timeline is not None and memory_timeline.suffix not in _TIMELINES:
        raise typer.BadParameter(
            f"--memory-timeline {str(memory_timeline)!r}: expected a name that ends in "
            f"{', '.join(_TIMELINES[:-1])} or {_TIMELINES[-1]}."
        )
    if budget is not None:
        check_budget(budget)
    if host_budget is not None:
        check_host_budget(host_budget)
    if output is not None and output.is_dir():
        raise typer.BadParameter(f"--output {str(output)!r} is a directory, expected a file.")
    from remat.cli.inputs import load_inputs
    from remat.cli.progress import ProgressBars
    from remat.cli.screen import machine_output, note

    with machine_output(as_json) as write:
        with ProgressBars("planning") as progress:
            inputs = load_inputs(workload, hf_config, batch)

            from remat.fit import Fit  # one trace for the plan and the front

            fit = Fit(
                inputs.model,
                inputs.batch,
                device=row,
                chunks=chunks,
                host_budget=host_budget,
                progress=progress.by_share,
                **inputs.step,
            )
            plan = None if budget is None else fit.plan(budget)
            points = (0 if as_json else _FRONT_POINTS) if frontier is None else frontier
            front = fit.frontier(points) if points else []
            if plan is not None and memory_timeline is not None:
                _write_timeline(inputs.name, plan, fit.memory_snapshot(plan), memory_timeline)
                note(f"memory timeline written to {memory_timeline}")
        if plan is not None and output is not None:
            plan.save(output)
            note(f"plan written to {output}")
        if as_json:
            write(_as_json(plan, front, with_front=frontier is not None))
        else:
            _print(inputs.name, plan, front)
    return 0


def _write_timeline(name: str, plan: Plan, snapshot: dict[str, Any], path: Path) -> None:
    """Write a memory timeline in the form that its name asks for."""
    if path.suffix == ".html":
        from remat.report.memory import write_memory

        write_memory(name, plan, snapshot, path)
    else:
        from remat.prove.snapshot import save_snapshot

        save_snapshot(snapshot, path)


def _as_json(plan: Plan | None, front: list[Plan], *, with_front: bool) -> str:
    """A plan alone is a plan file; with the front, an object of both."""
    import json

    if plan is not None and not with_front:
        return plan.model_dump_json(indent=1)
    return json.dumps(
        {
            "plan": None if plan is None else plan.model_dump(mode="json"),
            "frontier": [point.model_dump(mode="json") for point in front],
        },
        indent=1,
    )


def _print(name: str, plan: Plan | None, front: list[Plan]) -> None:
    from remat.cli.screen import out
    from remat.cli.sketch import front_view
    from remat.cli.tables import plan_view

    console = out()
    if plan is not None:
        console.print(plan_view(name, plan))
    if front:
        console.print(front_view(front, plan, console.width))
