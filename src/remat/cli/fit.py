"""`remat fit`: what fits where, how fast it is, and what an epoch costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remat.cli.options import (
    AllocConfOption,
    BatchOption,
    DeviceFileOption,
    HfConfigOption,
    JsonOption,
    OptionalWorkloadArgument,
    PricesOption,
    device_names,
    device_with,
    under_settings,
)

if TYPE_CHECKING:
    from torch import nn

    from remat.cli.inputs import Inputs
    from remat.cost.devices import Device
    from remat.sizing.survey import Subject

# Any: keywords of the user's own step.

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
    device_file: DeviceFileOption = None,
    alloc_conf: AllocConfOption = None,
    prices: PricesOption = None,
    hf_config: HfConfigOption = None,
    batch: BatchOption = None,
    sequence: Annotated[
        bool,
        typer.Option(
            "--sequence",
            help="Find the longest sequence at the batch given, not the largest batch.",
        ),
    ] = False,
    image_size: Annotated[
        bool,
        typer.Option(
            "--image-size", help="Find the largest square images at the batch given, in pixels."
        ),
    ] = False,
    depth: Annotated[
        bool,
        typer.Option(
            "--depth",
            help="With --hf-config: find the most hidden layers at the batch given, up to eight "
            "times those of the config.",
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
    blocks, and with remat's plans; its estimated time, and what an epoch costs. With --sequence,
    --image-size or --depth, that is made as large as possible, and the batch stays.

    No device needs to be here. Exit code 3 if not one example fits anywhere.
    """
    if sequence + image_size + depth > 1:
        raise typer.BadParameter("--sequence, --image-size and --depth: give one of them.")
    if depth and hf_config is None:
        raise typer.BadParameter("--depth needs --hf-config, whose layers it counts.")

    from remat.sizing.prices import load_prices

    rows = _devices(devices, device_file, alloc_conf)
    table = load_prices(prices)
    if page is not None and page.is_dir():
        raise typer.BadParameter(f"--page {str(page)!r} is a directory, expected a file.")

    from remat.cli.inputs import load_inputs
    from remat.cli.progress import ProgressBars
    from remat.cli.screen import machine_output, note, out

    with machine_output(as_json) as write:
        with ProgressBars("tracing small batches") as progress:
            inputs = load_inputs(workload, hf_config, batch)

            from remat.sizing import subjects
            from remat.sizing.survey import survey

            shared = {"shards": shards, **inputs.step}
            given = (inputs.name, inputs.model, inputs.batch)
            if depth:
                subject = _depth_subject(inputs, hf_config, batch, shared)
            elif image_size:
                rebuilt = _rebuilt_for_images(inputs, hf_config, batch)
                subject = subjects.image_subject(*given, make_model=rebuilt, **shared)
            elif sequence:
                shared |= _shallower(inputs, hf_config, batch)
                subject = subjects.sequence_subject(*given, **shared)
            else:
                shared |= _shallower(inputs, hf_config, batch)
                subject = subjects.batch_subject(*given, **shared)
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


def _depth_subject(
    inputs: Inputs, hf_config: str | None, batch: str | None, shared: dict[str, Any]
) -> Subject:
    from remat.architectures import depth_of
    from remat.sizing.subjects import depth_subject

    asked = depth_of(inputs.model)
    build = _with_layers(hf_config, batch)
    return depth_subject(inputs.name, build, inputs.batch, asked=asked, **shared)


def _shallower(inputs: Inputs, hf_config: str | None, batch: str | None) -> dict[str, Any]:
    """Return how to build an architecture with fewer layers, and how many it has."""
    layers = getattr(getattr(inputs.model, "config", None), "num_hidden_layers", None)
    if hf_config is None or not isinstance(layers, int):
        return {}
    return {"with_layers": _with_layers(hf_config, batch), "layers": layers}


def _with_layers(hf_config: str | None, batch: str | None) -> Callable[[int], nn.Module]:
    from remat.architectures import load_architecture

    return lambda depth: load_architecture(str(hf_config), str(batch), depth=depth).model


def _rebuilt_for_images(
    inputs: Inputs, hf_config: str | None, batch: str | None
) -> Callable[[int], nn.Module] | None:
    """Return how to build the model for a side of images; `None` where it takes any side."""
    from remat.architectures import load_architecture

    if hf_config is None or not hasattr(inputs.model.config, "image_size"):
        return None
    return lambda side: load_architecture(hf_config, str(batch), image_size=side).model


def _devices(names: str | None, file: Path | None, alloc_conf: str | None) -> list[Device]:
    """Find the devices by name before anything is loaded; without names, every GPU."""
    from remat.cost.devices import load_devices

    if names is not None:
        return [device_with(name, file, alloc_conf) for name in device_names(names)]
    found = load_devices(file).values()
    return [under_settings(device, alloc_conf) for device in found if device.kind != "cpu"]
