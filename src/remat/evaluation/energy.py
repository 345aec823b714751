"""Energy counters of this machine: joules, read where the processor or the driver counts them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


class AbstractMeter(ABC):
    """A counter of joules that only grows; `name` says what it counts."""

    name: str

    @abstractmethod
    def joules(self) -> float:
        """Return joules since some moment in the past."""


@dataclass(slots=True)
class RaplMeter(AbstractMeter):
    """The processor packages' own counters (RAPL): everything that runs on them is counted."""

    zones: tuple[Path, ...]
    name: str = "RAPL, whole processor packages"
    _last: dict[Path, int] | None = None
    _sum: int = 0

    def joules(self) -> float:
        """Return joules since the first call; a counter that has run over is carried on."""
        now = {zone: _read(zone / "energy_uj") for zone in self.zones}
        for zone, value in now.items():
            before = value if self._last is None else self._last[zone]
            span = _read(zone / "max_energy_range_uj") if value < before else 0
            self._sum += value - before + span
        self._last = now
        return self._sum / 1e6


@dataclass(slots=True)
class NvmlMeter(AbstractMeter):
    """The driver's counter of one GPU: `millijoules` reads it."""

    millijoules: Callable[[], int]
    name: str = "NVML, whole GPU"

    def joules(self) -> float:
        """Return joules since the driver was loaded."""
        return self.millijoules() / 1000


def find_meter(device_type: str, powercap: Path = _POWERCAP) -> AbstractMeter | None:
    """Return a counter for the device that trains, or `None` where none can be read."""
    return _nvml() if device_type == "cuda" else _rapl(powercap)


def _rapl(powercap: Path) -> AbstractMeter | None:
    zones = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue  # a part of a package, counted in it
        try:
            _read(zone / "energy_uj")
            _read(zone / "max_energy_range_uj")
        except (OSError, ValueError):
            return None  # counted, but for root's eyes only
        zones.append(zone)
    return RaplMeter(zones=tuple(zones)) if zones else None


def _nvml() -> AbstractMeter | None:
    try:
        import pynvml
    except ImportError:
        return None
    import torch

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return NvmlMeter(millijoules=lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def _read(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
