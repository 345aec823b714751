"""`remat calibrate`: measure this device, and show how good predictions are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remat.cli.options import JsonOption
from remat.cli.runs import RootOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from remat.calibrating.agreement import Agreement
    from remat.cost.calibration import Calibration, Experience

NAME = "calibrate"
EXAMPLE = "Example: remat calibrate; remat calibrate --report -o calibration.html"


def command(
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Row of the device table that is at hand; found by itself, unless given.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=5, metavar="S", help="About how long to measure.")
    ] = 60.0,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Measure nothing: learn from the recorded runs, and write the page that shows "
            "predicted against measured.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            show_default=False,
            help="With --report: the page; calibration.html here, unless given.",
        ),
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Measure the device at hand for a minute; every later plan for it uses the result.

    Times ops, regions, copies and the allocator, then predicts and measures steps that had no
    part in it. The result is kept in the user's cache (REMAT_CACHE, else ~/.cache/remat), for
    each device and number of threads. Runs in the store teach how far predictions were off:
    later plans print that as an error bar.
    """
    if output is not None and not report:
        raise typer.BadParameter("--output is the page of --report; give both.")

    import torch

    from remat.calibrating.hardware import at_hand
    from remat.calibrating.learning import learn_from_store
    from remat.cli.progress import ProgressBars
    from remat.cli.screen import machine_output, note, out
    from remat.cost.calibration import load_calibration, load_experience
    from remat.cost.usual import threads_of

    with machine_output(as_json) as write:
        row, _, _ = at_hand(device)
        if report:
            calibration = load_calibration(row.name, threads_of(row), torch.__version__)
        else:
            from remat.calibrating.measuring import calibrate

            with ProgressBars("starting") as progress:
                calibration = calibrate(row, seconds=seconds, progress=progress)
        learn_from_store(root)
        experience = load_experience(row.name, threads_of(row))
        if report:
            from remat.report.calibration import write_calibration

            page = write_calibration(calibration, experience, output or Path("calibration.html"))
            note(f"page written to {page}")
        if as_json:
            write(_as_json(calibration, experience))
        else:
            out().print(_view(row.name, calibration, experience))
    return 0


def _as_json(calibration: Calibration | None, experience: Experience) -> str:
    import json

    return json.dumps(
        {
            "calibration": None if calibration is None else calibration.model_dump(mode="json"),
            "experience": experience.model_dump(mode="json"),
        },
        indent=1,
    )


def _view(device: str, calibration: Calibration | None, experience: Experience) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from remat.calibrating.agreement import agreements
    from remat.units import format_seconds

    if calibration is None:
        head = Text(f"{device} is not calibrated: step times come from the roofline.")
        parts: list[RenderableType] = [head]
    else:
        head = Text.assemble(
            (calibration.hardware, "bold"),
            f" · {device}, threads: {calibration.num_threads}, {calibration.created[:10]}",
        )
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("step that had no part in it")
        for title in ("measured", "calibrated", "off", "roofline", "off"):
            table.add_column(title, justify="right", no_wrap=True)
        for check in calibration.checks:
            row = [check.name, format_seconds(check.measured_seconds)]
            for predicted in (check.calibrated_seconds, check.roofline_seconds):
                row += [format_seconds(predicted), f"{predicted / check.measured_seconds - 1:+.0%}"]
            table.add_row(*row)
        parts = [head, Text(), table]
    for source in ("calibrated", "measured", "roofline"):
        bar = experience.error_bar("step_seconds", source)
        if bar is not None:
            parts += [
                Text(),
                Text(
                    f"{source}: a step takes {bar.low_ratio:.2f} to {bar.high_ratio:.2f} times "
                    f"the prediction ({bar.level:.0%} of measurements, by {bar.num_trials})."
                ),
            ]
    told = [_told(found) for found in agreements(experience.trials)]
    return Group(*parts, Text(), *(Text(line) for line in told), Text())


def _told(found: Agreement) -> str:
    """Say how far predictions of one quantity were off, over all recorded runs."""
    kind = {"peak_bytes": "peaks", "step_seconds": "step times"}.get(found.quantity, found.quantity)
    by = f" by the {found.source} cost" if found.source else ""
    return (
        f"Predicted {kind}{by}: {found.median_absolute_error:.2%} off in the median, "
        f"{found.largest_absolute_error:.2%} at most ({found.worst.variant} of {found.worst.run}), "
        f"too low {found.num_below} times, over {found.num_trials} variants of {found.num_runs} "
        "recorded runs."
    )
