"""The device at hand, and which row of the device table stands for it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from remat.cost.devices import Device, find_device, load_devices
from remat.errors import DeviceError


def at_hand(device: Device | str | None = None) -> tuple[Device, torch.device, str]:
    """Return the row of the table, torch's device, and the hardware's name.

    Raises
    ------
    DeviceError: if the device is not at hand, or no row stands for the GPU that is.
    """
    row = find_device(device) if isinstance(device, str) else device
    has_gpu = torch.cuda.is_available()
    if row is None and not has_gpu:
        row = find_device("cpu")
    if row is not None and row.kind == "cpu":
        return row, torch.device("cpu"), processor_name()
    if row is not None and not (has_gpu and row.torch_type == "cuda"):
        raise DeviceError(
            f"device {row.name!r} is not at hand: this machine has "
            f"{torch.cuda.get_device_name() if has_gpu else 'no GPU that torch can use'}. "
            "Calibrate on the machine that has it; the file may be copied here."
        )
    hardware = torch.cuda.get_device_name()
    return row or row_of(hardware), torch.device("cuda"), hardware


def row_of(hardware: str) -> Device:
    """Return the row whose name's words are all in the GPU's own name, the most words first.

    Raises
    ------
    DeviceError: if there is none.
    """
    words = set(re.findall(r"[a-z0-9]+", hardware.lower()))
    fitting = [
        (len(wanted), row)
        for row in load_devices().values()
        if row.torch_type == "cuda" and (wanted := _words(row.name)) <= words
    ]
    if not fitting:
        raise DeviceError(
            f"no row of the device table stands for {hardware!r}. Name one with --device, or add "
            "one in a file of devices."
        )
    return max(fitting, key=lambda item: item[0])[1]


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def processor_name() -> str:
    """Return what the operating system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
