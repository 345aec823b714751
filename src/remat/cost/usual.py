"""The usual cost model of a device: calibrated where `remat calibrate` ran, else its roofline."""

from __future__ import annotations

import dataclasses

import torch

from remat.cost.calibration import (
    STEP_SECONDS,
    ErrorBar,
    load_calibration,
    load_experience,
)
from remat.cost.devices import Device, find_device
from remat.cost.model import CostModel
from remat.errors import DeviceError


def usual_cost(device: Device) -> CostModel:
    """Price ops on a device by its calibration, where there is one for this torch and threads.

    A device whose figures are the caller's own, not those of the table, keeps them.

    Raises
    ------
    DeviceError: if the calibration's file is damaged.
    """
    if not _is_of_the_table(device):
        return CostModel(device=device)
    calibration = load_calibration(device.name, threads_of(device), torch.__version__)
    return CostModel(device=device, calibration=calibration)


def step_error_bar(cost: CostModel) -> ErrorBar | None:
    """Return how far measured step times were from predictions priced like this one."""
    experience = load_experience(cost.device.name, threads_of(cost.device))
    return experience.error_bar(STEP_SECONDS, source_kind(cost.source))


def source_kind(source: str) -> str:
    """Return the kind of source that priced a plan: calibrated, measured or roofline."""
    return source.partition(" ")[0]


def threads_of(device: Device) -> int | None:
    """Return the threads that a CPU's figures depend on; `None` for other devices."""
    return torch.get_num_threads() if device.kind == "cpu" else None


def _is_of_the_table(device: Device) -> bool:
    try:
        return find_device(device.name) == dataclasses.replace(device, alloc_conf="")
    except DeviceError:
        return False
