"""Where a training runs: devices by torch's names, checked against those that are here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from remat.errors import DeviceError
from remat.workload import Workload

_FORM = re.compile(r"cpu|mps|cuda(:[0-9]+)?")
CPU, ANY_CUDA = "cpu", "cuda"


def cards_here() -> Mapping[str, str]:
    """Name every accelerator of this machine, with what CUDA_VISIBLE_DEVICES calls it."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = range(torch.cuda.device_count())
    named = [str(number) for number in numbers] if listed is None else listed.split(",")
    cards = {f"cuda:{number}": named[number].strip() for number in numbers}
    return cards | ({"mps": ""} if torch.backends.mps.is_available() else {})


def check_device(name: str, cards: Iterable[str]) -> str:
    """Return the device's name as torch writes it, if it is here: `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises
    ------
    DeviceError: if it is no such name, or no such device is here; the message has those that are.
    """
    found = name.strip().lower()
    here = (CPU, *cards)
    if not _FORM.fullmatch(found):
        raise DeviceError(
            f"device {name!r} is nothing to train on: expected one of those here "
            f"({', '.join(here)}). A card that is not here can be planned for, with "
            "`remat plan --device`, or priced, with `--devices`."
        )
    if found not in here and not any(can_take(found, card) for card in here):
        raise DeviceError(f"device {name!r} is not here: there is {', '.join(here)}.")
    return found


def can_take(wanted: str, card: str) -> bool:
    """Say whether a card is what was asked for: `cuda` is any CUDA device."""
    return wanted == card or (wanted == ANY_CUDA and card.startswith(f"{ANY_CUDA}:"))


def placed(workload: Workload, device: str | None) -> Workload:
    """Return the workload with its model on the device; as it is for `None`.

    The model is built as before, from the same random state, and moved: training starts from the
    same weights on every device.

    Raises
    ------
    DeviceError: if the device is not here.
    """
    if device is None:
        return workload
    place = torch.device(check_device(device, cards_here()))

    def build() -> nn.Module:
        model = workload.model()
        # what is no module is refused where the model is called for
        return model.to(place) if isinstance(model, nn.Module) else model

    return dataclasses.replace(workload, model=build)
