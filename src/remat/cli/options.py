"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from remat.cost.devices import Device


def _python_files(incomplete: str) -> list[str]:
    """Complete a workload's name by the Python files and folders that begin so."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    named = [f"{path}/" if path.is_dir() else str(path) for path in inside]
    return [name for name in named if name.startswith(incomplete) and name.endswith((".py", "/"))]


WORKLOAD_HELP = "PATH.py[:NAME] or package.module[:NAME]; NAME is 'workload' unless given."

_WORKLOAD = typer.Argument(
    metavar="WORKLOAD", show_default=False, autocompletion=_python_files, help=WORKLOAD_HELP
)
WorkloadArgument = Annotated[str, _WORKLOAD]
OptionalWorkloadArgument = Annotated[str | None, _WORKLOAD]
RunFolderOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        show_default=False,
        help="Folder of this run; a new one in the store of runs, unless given.",
    ),
]
DeviceFileOption = Annotated[
    Path | None,
    typer.Option(
        "--device-file",
        metavar="FILE",
        show_default=False,
        help="A table of devices of your own, over the one that comes with remat.",
    ),
]
AllocConfOption = Annotated[
    str | None,
    typer.Option(
        "--alloc-conf",
        metavar="SETTINGS",
        show_default=False,
        help="Settings of CUDA's caching allocator as in PYTORCH_ALLOC_CONF, NAME:VALUE with "
        "commas between: expandable_segments, max_split_size_mb, roundup_power2_divisions, "
        "per_process_memory_fraction, garbage_collection_threshold. Train with the same.",
    ),
]
PricesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="Prices of your own, over those that come with remat.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document on stdout, and everything else on stderr."
    ),
]
HfConfigOption = Annotated[
    str | None,
    typer.Option(
        "--hf-config",
        metavar="FILE",
        show_default=False,
        help="Take the Transformers architecture of this config.json, without weights.",
    ),
]
BatchOption = Annotated[
    str | None,
    typer.Option(
        metavar="SHAPE",
        show_default=False,
        help="With --hf-config: 4x1024 (sequences x tokens) or 8x3x224x224 (images).",
    ),
]
BUDGET_HELP = (
    "Total peak of one training step: 8GiB, 8GB, 800MiB, bytes, or 60% of the keep-everything peak."
)

HOST_BUDGET_HELP = (
    "Let saved tensors wait in at most this much host memory: 4GiB. Off, unless given."
)


def check_budget(budget: str) -> str:
    """Refuse a budget that cannot be read at once, before torch and the model are loaded."""
    from remat.units import parse_budget

    parse_budget(budget, keep_all_peak_bytes=2**40)  # only percentages look at it
    return budget


def check_host_budget(budget: str) -> None:
    """Refuse a budget of host memory that cannot be read, before anything is loaded."""
    from remat.units import parse_host_budget

    parse_host_budget(budget)


def device_with(name: str, file: Path | None, alloc_conf: str | None) -> Device:
    """Return a row of the device table, or of a file over it, under the allocator's settings."""
    from remat.cost.devices import find_device

    return under_settings(find_device(name, file), alloc_conf)


def under_settings(device: Device, alloc_conf: str | None) -> Device:
    """Return a device under other settings of its allocator, where it has one that takes them."""
    import dataclasses

    if alloc_conf is None or device.torch_type != "cuda":
        return device
    return dataclasses.replace(device, alloc_conf=alloc_conf)


def device_names(text: str) -> tuple[str, ...]:
    """Split `--devices`; a list of none is a usage error."""
    wanted = tuple(name.strip() for name in text.split(",") if name.strip())
    if not wanted:
        raise typer.BadParameter("--devices names none: give at least one, such as A100-80GB.")
    return wanted
