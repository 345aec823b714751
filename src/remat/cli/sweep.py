"""`remat sweep`: one evaluation from many seeds, on many devices, several processes at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remat.cli.options import BUDGET_HELP, JsonOption, WorkloadArgument, check_budget
from remat.cli.runs import RootOption

if TYPE_CHECKING:
    from remat.evaluation.cells import Ended
    from remat.evaluation.places import AbstractPlace
    from remat.runs.across import DeviceResult

NAME = "sweep"
EXAMPLE = "Example: remat sweep examples/digits_vit.py --seeds 3 --budget 60% --jobs 2"


def command(
    workload: WorkloadArgument,
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget", "-b", show_default=False, help=f"{BUDGET_HELP} May be given several times."
        ),
    ],
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many seeds, from --first-seed on.")
    ] = 3,
    first_seed: Annotated[int, typer.Option(min=0, metavar="N", help="The first seed.")] = 0,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="NAME,...",
            show_default=False,
            help="Train every cell on each of these: cpu, cuda:0, cuda:1; cuda is any CUDA device "
            "that is free. Where the workload builds its model, unless given.",
        ),
    ] = None,
    apart: Annotated[
        bool, typer.Option("--apart", help="A run for each budget; else one for all of a seed.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Processes at a time.")] = 2,
    threads: Annotated[
        int, typer.Option(min=1, metavar="N", help="Threads of each; results depend on it.")
    ] = 1,
    on: Annotated[
        str, typer.Option(metavar="PLACE", help="Where: 'local', or 'ray' with remat[ray].")
    ] = "local",
    epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default=False, help="As in evaluate.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default=False, help="As in evaluate.")
    ] = None,
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Begins the folders of the runs, and tags them; called again with it, a sweep "
            "goes on. From the workload's file, unless given.",
        ),
    ] = "",
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Evaluate a workload from several seeds, in parallel; each run goes to the store, tagged.

    With --device, from each seed on each device; a cell has its card to itself. Results are the
    same bit for bit wherever the cells run; step times are those of a busy machine.
    Exit code as of evaluate, the worst of all cells.
    """
    budgets = [check_budget(one) for one in budget]
    devices = _names(device)
    place = _place(on, jobs)

    from remat.cli.screen import note, out
    from remat.evaluation.sweeping import make_cells, sweep
    from remat.report.sweeps import sweep_view
    from remat.runs.across import by_device
    from remat.runs.store import RUN_FILE, load_run, store_root

    named = name or f"sweep-{Path(workload.partition(':')[0]).stem}"
    options: list[str] = []
    for word, value in (("--epochs", epochs), ("--max-steps", max_steps)):
        options += [] if value is None else [word, str(value)]
    cells = make_cells(
        workload,
        store_root(root),
        named,
        seeds=range(first_seed, first_seed + seeds),
        budgets=budgets,
        devices=devices,
        apart=apart,
        options=options,
    )
    ended = sweep(
        cells,
        place,
        tag=named,
        threads=threads,
        on_end=lambda one: note(f"{one.cell.folder.name}: {_word(one)}"),
    )
    folders = [one.cell.folder for one in ended if (one.cell.folder / RUN_FILE).is_file()]
    results = by_device([load_run(folder) for folder in folders])
    if as_json:
        typer.echo(json.dumps(_as_data(ended, results), indent=1))
    else:
        for one in ended:
            typer.echo(f"{one.cell.folder}  {_word(one)}")
        if results:
            out().print(sweep_view(results))
    return max((one.exit_code for one in ended), key=_severity)


def _names(given: list[str] | None) -> list[str]:
    """Split `--device`, which may be given several times and hold commas."""
    return [name.strip().lower() for one in given or () for name in one.split(",") if name.strip()]


def _place(on: str, jobs: int) -> AbstractPlace:
    if on not in _PLACES:
        raise typer.BadParameter(f"--on {on!r}: there are {', '.join(_PLACES)}.")
    return _PLACES[on](jobs)


def _local(jobs: int) -> AbstractPlace:
    from remat.evaluation.places import LocalProcesses
    from remat.evaluation.placing import cards_here

    return LocalProcesses(jobs=jobs, cards=cards_here())


def _ray(jobs: int) -> AbstractPlace:
    from remat.evaluation.places import OnRay

    return OnRay(jobs=jobs)


_PLACES: dict[str, Callable[[int], AbstractPlace]] = {"local": _local, "ray": _ray}


def _severity(code: int) -> int:
    """Order exit codes: done, infeasible, a failed check, bad input, our own fault or a kill."""
    order = (0, 3, 1, 2)
    return order.index(code) if code in order else len(order)


def _word(one: Ended) -> str:
    words = {0: "passed", 1: "FAILED", 3: "infeasible"}
    return one.message or words.get(one.exit_code, f"ended with {one.exit_code}")


def _as_data(ended: Sequence[Ended], results: Sequence[DeviceResult]) -> dict[str, object]:
    cells = [
        {
            "path": str(one.cell.folder),
            "seed": one.cell.seed,
            "budgets": list(one.cell.budgets),
            "device": one.cell.device,
            "exit_code": one.exit_code,
            "message": one.message,
        }
        for one in ended
    ]
    return {"cells": cells, "by_device": [one.model_dump(mode="json") for one in results]}
