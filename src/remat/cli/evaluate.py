"""`remat evaluate`: the main job, training under several plans side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remat.cli.options import (
    BUDGET_HELP,
    JsonOption,
    PricesOption,
    RunFolderOption,
    WorkloadArgument,
    check_budget,
    device_names,
)

if TYPE_CHECKING:
    from remat.evaluation.pricing import ExpenseOptions
    from remat.evaluation.serving.options import ServingOptions

NAME = "evaluate"
EXAMPLE = "Example: remat evaluate examples/digits_vit.py --budget 80% --budget 60% --seeds 3"


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
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Where to train: cpu, cuda, cuda:1; where the workload builds its model, unless "
            "given.",
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
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="Trainings of each variant, from the seed on; one, unless given. From two on, a "
            "variant that differs from training without a plan is tested for equivalence.",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            show_default=False,
            help="Difference up to which variants are equivalent, such as 0.005; one point of a "
            "share such as accuracy and 1% of anything else, unless given.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="METRIC=X",
            show_default=False,
            help="Quality to reach, such as accuracy=0.9: the time in training until then is "
            "recorded. May be given several times; the workload's own, unless given.",
        ),
    ] = None,
    check_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="Steps between two looks at whether the targets are reached; a tenth of an epoch, "
            "unless given.",
        ),
    ] = None,
    serving: Annotated[
        bool,
        typer.Option(
            "--serving/--no-serving",
            help="Whether the trained model is served and timed, exported and quantized: ten "
            "seconds or more, however short the training.",
        ),
    ] = True,
    latency_target: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            show_default=False,
            help="Recommend a form and batch size that answers within this, such as 20ms.",
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="NAME,...",
            show_default=False,
            help="Devices to price the run on, with commas between; a few, unless given.",
        ),
    ] = None,
    prices: PricesOption = None,
    out: RunFolderOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            show_default=False,
            help="Go on with a run that was interrupted, from what it finished: its folder or id. "
            "What is not given is as the run was begun.",
        ),
    ] = None,
    keep_weights: Annotated[
        bool,
        typer.Option(
            "--keep-weights", help="Keep the final weights of each variant, in safetensors."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Train a workload under several plans, prove that nothing changed, and see what it cost.

    Trains with the same seeds under no plan, with all blocks recomputed, and under a plan for each
    budget; measures quality, calibration and slices; serves the trained model, and prices the run
    on each device. Writes run.json and report.html. Exit code 1 if a check failed, 3 if no plan
    reached a budget.
    """
    budgets = [check_budget(one) for one in budget or ()]
    if out is not None and resume is not None:
        raise typer.BadParameter("--out names a new run, --resume one to go on with: give one.")
    targets = _targets(target)
    names = None if devices is None else device_names(devices)

    from remat.cli.progress import ProgressBars
    from remat.cli.results import exit_code_of, show_run
    from remat.cli.screen import machine_output
    from remat.runs.store import find_run, load_run, new_run_dir
    from remat.workloads import load_workload

    served, priced = _options(serving, latency_target, names, prices)
    with machine_output(as_json) as write:
        loaded = load_workload(workload)
        if resume is None:
            folder = out or new_run_dir(loaded.name)
        else:
            folder, begun = find_run(resume), load_run(resume)
        with ProgressBars("preparing") as progress:
            import remat
            from remat.evaluation.resuming import as_begun

            given: dict[str, Any] = {
                "budgets": budgets or None,
                "device": device,
                "seed": seed,
                "seeds": seeds,
                "margin": margin,
                "targets": targets,
                "check_every": check_every,
                "epochs": epochs,
                "max_steps": max_steps,
                "keep_trained_weights": keep_weights or None,
            }
            # what is not given is as the run was begun, or else the default of `evaluate`
            chosen = {name: value for name, value in given.items() if value is not None}
            if resume is None:
                chosen |= {"out": folder, "serving": served, "expenses": priced}
            else:
                if not serving or latency_target is not None:
                    chosen["serving"] = served
                if names is not None or prices is not None:
                    chosen["expenses"] = priced
                chosen = as_begun(begun) | chosen | {"resume": folder}
            run = remat.evaluate(loaded, **chosen, progress=progress)
        show_run(run, folder, write if as_json else None)
    return exit_code_of(run)


def _targets(given: list[str] | None) -> dict[str, float] | None:
    """Read METRIC=X options; `None` where there are none."""
    if not given:
        return None
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not (equals and name.strip()):
            raise typer.BadParameter(f"{one!r}: expected METRIC=X, such as accuracy=0.9.")
    return found


def _options(
    serving: bool,
    latency_target: str | None,
    devices: tuple[str, ...] | None,
    prices: Path | None,
) -> tuple[ServingOptions | None, ExpenseOptions]:
    """Read what the line says of serving and prices; broken tables are told before training."""
    from remat.evaluation.pricing import COMMON_DEVICES, ExpenseOptions
    from remat.evaluation.serving.options import ServingOptions, parse_latency

    if latency_target is not None and not serving:
        raise typer.BadParameter("--latency-target says how to serve: leave out --no-serving.")
    target = None if latency_target is None else parse_latency(latency_target)
    priced = ExpenseOptions(devices=devices or COMMON_DEVICES, prices=prices)
    priced.load()
    return (ServingOptions(target_p95_seconds=target) if serving else None), priced
