"""`remat fit`: what fits where, how fast it is, and what an epoch costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remat.cli.options import BatchOption, HfConfigOption, JsonOption, OptionalWorkloadArgument

if TYPE_CHECKING:
    from remat.cost.devices import Device

NAME = "fit"
EXAMPLE = "Example: remat fit examples/digits_vit.py --devices T4,L4,H100-80GB"


def command(
    workload: OptionalWorkloadArgument = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="NAME,...",
            show_default=False,
            help="Devices of the table, with commas between; every GPU in it, unless given.",
        ),
    ] = None,
    device_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="A table of devices of your own, over the one that comes with remat.",
        ),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Prices of your own, over those that come with remat.",
        ),
    ] = None,
    hf_config: HfConfigOption = None,
    batch: BatchOption = None,
    sequence: Annotated[
        bool,
        typer.Option(
            "--sequence",
            help="Find the longest sequence at the batch given, not the largest batch.",
        ),
    ] = False,
    shards: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Devices that training is fully sharded over (FSDP2): sizes are per device.",
        ),
    ] = 1,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="Examples per epoch; those of the workload's data, unless given.",
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--page", metavar="FILE", show_default=False, help="Write table and picture as HTML."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Say what fits where: the largest batch of each device with nothing recomputed, with all
    blocks, and with remat's plans; its estimated time, and what an epoch costs.

    No device needs to be here. Exit code 3 if not one example fits anywhere.
    """
    from remat.sizing.prices import load_prices

    rows = _devices(devices, device_file)
    table = load_prices(prices)
    if page is not None and page.is_dir():
        raise typer.BadParameter(f"--page {str(page)!r} is a directory, expected a file.")

    from remat.cli.inputs import load_inputs
    from remat.cli.progress import ProgressBars
    from remat.cli.screen import machine_output, note, out

    with machine_output(as_json) as write:
        with ProgressBars("tracing small batches") as progress:
            inputs = load_inputs(workload, hf_config, batch)

            from remat.sizing.subjects import batch_subject, sequence_subject
            from remat.sizing.survey import survey

            make = sequence_subject if sequence else batch_subject
            subject = make(inputs.name, inputs.model, inputs.batch, shards=shards, **inputs.step)
            found = survey(
                subject,
                rows,
                prices=table,
                examples_per_epoch=examples or inputs.num_examples,
                progress=progress.by_share,
            )
        if page is not None:
            from remat.report.sizes import write_survey

            write_survey(found, page)
            note(f"page written to {page}")
        if as_json:
            write(found.model_dump_json(indent=1))
        else:
            from remat.cli.sizes import survey_view

            out().print(survey_view(found))
    return 0


def _devices(names: str | None, file: Path | None) -> list[Device]:
    """Find the devices by name before anything is loaded; without names, every GPU."""
    from remat.cost.devices import find_device, load_devices

    if names is None:
        return [device for device in load_devices(file).values() if device.kind != "cpu"]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise typer.BadParameter("--devices names none: give at least one, such as A100-80GB.")
    return [find_device(name, file) for name in wanted]
