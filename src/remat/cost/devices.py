"""The device table: peak speed, bandwidth and memory of the devices that a plan can be made for."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from remat.cost.allocator_rules import AllocatorOptions, parse_alloc_conf
from remat.cost.tables import read_table
from remat.errors import DeviceError
from remat.units import format_bytes

SCHEMA_VERSION: Final = 1
KINDS: Final = ("cpu", "cuda", "mps", "rocm")
DTYPES: Final = ("float64", "float32", "tf32", "bfloat16", "float16", "float8", "int8")

_PACKAGE_FILE: Final = Path(__file__).with_name("devices.toml")
_MOST_MEMORY: Final = 10 * 1024**4
_MOST_BANDWIDTH: Final = 100e12
_MOST_FLOPS: Final = 1e17
_MOST_OVERHEAD: Final = 1.0
_USABLE_SHARE: Final = 0.97

# Any: what TOML holds is checked here before it becomes a Device.


@dataclass(frozen=True, kw_only=True)
class Device:
    """One row of the device table: the vendor's peak figures, and what eager mode adds.

    Arguments
    ---------
    kind: one of `cpu`, `cuda`, `mps`, `rocm`.
    memory_bytes: the device's own memory.
    usable_bytes: what torch can be given of it, the context included; by default 97% of
        `memory_bytes`, as drivers and error correction keep up to 3%.
    context_bytes: what the device's context takes outside torch's allocator.
    workspace_bytes: what cuBLAS takes from torch's allocator for each thread that multiplies.
    compute_capability: of an NVIDIA device, such as "9.0": it decides which kernels run.
    alloc_conf: settings of the caching allocator, as in `PYTORCH_ALLOC_CONF`, that the step is to
        run under: max_split_size_mb, expandable_segments, garbage_collection_threshold,
        roundup_power2_divisions, per_process_memory_fraction.
    memory_source: where these figures come from, with a date.
    bandwidth_bytes_per_s: peak of that memory.
    host_bandwidth_bytes_per_s: peak of copies between that memory and the host's, one direction.
    flops: dtype -> peak operations per second, dense; `float32` is required. `tf32` is the rate of
        float32 matrix products where TF32 is allowed.
    op_overhead_s: time to dispatch one op in eager mode.
    region_overhead_s: time that one recomputed region adds in eager mode.
    saved_tensor_overhead_s: time that each tensor saved inside a region adds.
    source: where the figures come from, with a date.

    Raises
    ------
    DeviceError: if a figure is missing, not a number, not positive, or beyond any real device.
    """

    name: str
    kind: str = "cpu"
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: Mapping[str, float]
    op_overhead_s: float = 5e-6
    region_overhead_s: float = 155e-6
    saved_tensor_overhead_s: float = 11e-6
    host_bandwidth_bytes_per_s: float = 16e9
    source: str = ""
    usable_bytes: int | None = None
    context_bytes: int = 0
    workspace_bytes: int = 0
    compute_capability: str | None = None
    memory_source: str = ""
    alloc_conf: str = ""

    def __post_init__(self) -> None:
        _check(self, f"device {self.name!r}")

    @property
    def available_bytes(self) -> int:
        """Return what a training process may take in all, its context included."""
        limit = self.allocator_options.limit_bytes
        limited = self._usable_bytes if limit is None else limit + self.context_bytes
        return min(self._usable_bytes, limited)

    @property
    def _usable_bytes(self) -> int:
        return self.usable_bytes or int(self.memory_bytes * _USABLE_SHARE)

    @property
    def allocator_options(self) -> AllocatorOptions:
        """Return the settings of the caching allocator."""
        return parse_alloc_conf(self.alloc_conf, self._usable_bytes)

    @property
    def torch_type(self) -> str:
        """Return torch's name for the kind of device; AMD's devices go by `cuda`."""
        return "cuda" if self.kind == "rocm" else self.kind

    @property
    def capability(self) -> tuple[int, int] | None:
        """Return the compute capability as two numbers."""
        if self.compute_capability is None:
            return None
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)

    def flops_for(self, dtype: str) -> float:
        """Return the peak rate for a dtype; the rate of float32 where the table has none for it."""
        return self.flops.get(dtype, self.flops["float32"])


def load_devices(path: str | os.PathLike[str] | None = None) -> dict[str, Device]:
    """Return the devices of the package's table by name, with those of a user's file over them.

    Arguments
    ---------
    path: a file of the same form. A device of a known name overrides the figures that it states;
        any other is added, and must state all of them.

    Raises
    ------
    DeviceError: if a file cannot be read, has a field that is not known, or a figure that is
        missing or absurd; the message names file, device and field.
    """
    return _load(path).devices


def find_device(name: str, path: str | os.PathLike[str] | None = None) -> Device:
    """Return one device by name; `"cpu"`, `"cuda"`, `"mps"` and `"rocm"` name the usual one.

    Letter case does not matter.

    Raises
    ------
    DeviceError: if the name is not in the table (the message has the nearest names), or a file is
        not valid.
    """
    table = _load(path)
    if not isinstance(name, str):
        raise DeviceError(f"device {name!r} is not a name: expected text such as 'A100-80GB'.")
    wanted = table.default_by_kind.get(name, name).casefold()
    by_folded = {known.casefold(): device for known, device in table.devices.items()}
    if wanted in by_folded:
        return by_folded[wanted]
    # "a100" is a less close match of "a100-80gb" than "a10g" is, but what was meant.
    near = [known for known in by_folded if wanted and wanted in known]
    near = near or difflib.get_close_matches(wanted, by_folded, n=3, cutoff=0.5)
    if near:
        hint = f"Did you mean {' or '.join(repr(by_folded[n].name) for n in near)}?"
    else:
        hint = f"Known: {', '.join(table.devices)}."
    raise DeviceError(
        f"device {name!r} is not in the device table. {hint} "
        "From Python, a remat.Device of your own can be passed instead."
    )


@dataclass(frozen=True, kw_only=True)
class _Table:
    devices: dict[str, Device]
    default_by_kind: dict[str, str]


def _load(path: str | os.PathLike[str] | None) -> _Table:
    rows, defaults = _read(_PACKAGE_FILE)
    files = dict.fromkeys(rows, str(_PACKAGE_FILE.name))
    if path is not None:
        user_rows, user_defaults = _read(Path(path))
        for name, row in user_rows.items():
            known = rows.get(name, {})
            flops = {**known.get("flops", {}), **row.get("flops", {})}
            rows[name] = {**known, **row} | ({"flops": flops} if flops else {})
            files[name] = os.fspath(path)
        defaults |= user_defaults
    devices = {name: _device(name, row, files[name]) for name, row in rows.items()}
    for kind, name in defaults.items():
        if name not in devices:
            raise DeviceError(
                f"{os.fspath(path or _PACKAGE_FILE.name)}: default_by_kind.{kind} names {name!r}, "
                "which is no device of the table."
            )
    return _Table(devices=devices, default_by_kind=defaults)


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Read one file's rows, with the form but not yet the figures checked."""
    data = read_table(path, "device table", schema_version=SCHEMA_VERSION)
    rows, defaults = data.pop("device", {}), data.pop("default_by_kind", {})
    for key in data:
        raise DeviceError(
            f"{path}: {key} is not a known field: expected schema_version, default_by_kind, device."
        )
    for label, value in (("device", rows), ("default_by_kind", defaults)):
        if not isinstance(value, dict):
            raise DeviceError(f"{path}: {label} must be a table, got {value!r}.")
    known = {field.name for field in fields(Device)} - {"name"}
    for name, row in rows.items():
        if not isinstance(row, dict):
            raise DeviceError(f"{path}: device.{name} must be a table, got {row!r}.")
        for key in row:
            if key not in known:
                raise DeviceError(
                    f"{path}: device.{name}.{key} is not a known field: "
                    f"expected {', '.join(sorted(known))}."
                )
        if not isinstance(row.get("flops", {}), dict):
            raise DeviceError(
                f"{path}: device.{name}.flops must be a table of dtypes, got {row['flops']!r}."
            )
    for kind, name in defaults.items():
        if kind not in KINDS or not isinstance(name, str):
            raise DeviceError(
                f"{path}: default_by_kind.{kind} = {name!r}: expected one of {', '.join(KINDS)} "
                "and a device's name."
            )
    return rows, defaults


def _device(name: str, row: dict[str, Any], file: str) -> Device:
    where = f"{file}: device.{name}"
    for required in ("kind", "memory_bytes", "bandwidth_bytes_per_s", "flops", "source"):
        if required not in row:
            raise DeviceError(f"{where}.{required} is missing.")
    memory = row["memory_bytes"]
    if isinstance(memory, float) and memory.is_integer():  # 80e9 is how people write it
        row = {**row, "memory_bytes": int(memory)}
    try:
        return Device(name=name, **row)
    except DeviceError as error:
        raise DeviceError(f"{file}: {error}") from error


def _check(device: Device, where: str) -> None:
    """Refuse figures that no device has."""
    for label in ("name", "kind", "source", "memory_source", "alloc_conf"):
        value = getattr(device, label)
        if not isinstance(value, str) or (not value and label in ("name", "kind")):
            raise DeviceError(f"{where}: {label} must be text, got {value!r}.")
    if device.kind not in KINDS:
        raise DeviceError(f"{where}: kind is {device.kind!r}, expected one of {', '.join(KINDS)}.")
    memory = device.memory_bytes
    if isinstance(memory, bool) or not isinstance(memory, int) or not 0 < memory <= _MOST_MEMORY:
        raise DeviceError(
            f"{where}: memory_bytes is {memory!r}, expected a whole number of bytes from 1 to "
            f"{_MOST_MEMORY} ({format_bytes(_MOST_MEMORY)})."
        )
    _check_shares(device, where)
    _check_alloc_conf(device, where)
    for label in ("bandwidth_bytes_per_s", "host_bandwidth_bytes_per_s"):
        _check_rate(getattr(device, label), _MOST_BANDWIDTH, f"{where}: {label}")
    if not isinstance(device.flops, Mapping) or "float32" not in device.flops:
        raise DeviceError(f"{where}: flops.float32 is missing.")
    for dtype, rate in device.flops.items():
        if dtype not in DTYPES:
            raise DeviceError(
                f"{where}: flops.{dtype} is not a known dtype: expected {', '.join(DTYPES)}."
            )
        _check_rate(rate, _MOST_FLOPS, f"{where}: flops.{dtype}")
    for label in ("op_overhead_s", "region_overhead_s", "saved_tensor_overhead_s"):
        seconds = getattr(device, label)
        if not _is_number(seconds) or not 0 <= seconds <= _MOST_OVERHEAD:
            raise DeviceError(
                f"{where}: {label} is {seconds!r}, expected seconds from 0 to {_MOST_OVERHEAD:g}."
            )


def _check_shares(device: Device, where: str) -> None:
    """Refuse parts of the memory that are larger than it, and what is no compute capability."""
    for label in ("usable_bytes", "context_bytes", "workspace_bytes"):
        size = getattr(device, label)
        if size is None and label == "usable_bytes":
            continue
        # Data sheets count in powers of ten, drivers in powers of two: 80 GB may be 79 GiB.
        most = int(device.memory_bytes * 1.1) if label == "usable_bytes" else device.memory_bytes
        least = 1 if label == "usable_bytes" else 0
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= most:
            raise DeviceError(
                f"{where}: {label} is {size!r}, expected a whole number of bytes from {least} to "
                f"{most} ({format_bytes(most)})."
            )
    capability = device.compute_capability
    if capability is not None and not (
        isinstance(capability, str) and re.fullmatch(r"[0-9]{1,2}\.[0-9]", capability)
    ):
        raise DeviceError(
            f"{where}: compute_capability is {capability!r}, expected text such as '9.0'."
        )


def _check_alloc_conf(device: Device, where: str) -> None:
    """Refuse settings that PyTorch would, or that are not modelled."""
    try:
        device.allocator_options  # noqa: B018  read for its errors
    except DeviceError as error:
        raise DeviceError(f"{where}: alloc_conf: {error}") from error


def _check_rate(value: Any, most: float, where: str) -> None:
    if not _is_number(value) or not 0 < value <= most:
        raise DeviceError(f"{where} is {value!r}, expected a number above 0, at most {most:g}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
