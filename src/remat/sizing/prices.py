"""What an hour of a device costs: the package's table, with those of a user's file over it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from remat.cost.tables import read_table
from remat.errors import DeviceError

SCHEMA_VERSION: Final = 1
_PACKAGE_FILE: Final = Path(__file__).with_name("prices.toml")
_MOST_USD: Final = 10_000.0
_FIELDS: Final = ("usd_per_hour", "source", "date")

# Any: what TOML holds is checked here before it becomes a Price.


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one device costs an hour, by whom and when."""

    usd_per_hour: float
    source: str
    date: str


def load_prices(path: str | os.PathLike[str] | None = None) -> dict[str, Price]:
    """Return prices by device's name, those of a user's file over those of the package.

    Raises
    ------
    DeviceError: if a file cannot be read, has a field that is not known, or lacks one, or a price
        is not above 0; the message names file, device and field.
    """
    found = _read(_PACKAGE_FILE)
    return found if path is None else found | _read(Path(path))


def _read(path: Path) -> dict[str, Price]:
    data = read_table(path, "price table", schema_version=SCHEMA_VERSION)
    rows = data.pop("price", {})
    for key in data:
        raise DeviceError(f"{path}: {key} is not a known field: expected schema_version, price.")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise DeviceError(f"{path}: price must be a table of devices.")
    return {name: _price(row, f"{path}: price.{name}") for name, row in rows.items()}


def _price(row: dict[str, Any], where: str) -> Price:
    for key in row:
        if key not in _FIELDS:
            raise DeviceError(f"{where}.{key} is not a known field: expected {', '.join(_FIELDS)}.")
    for key in _FIELDS:
        if key not in row:
            raise DeviceError(f"{where}.{key} is missing.")
    usd = row["usd_per_hour"]
    is_number = isinstance(usd, (int, float)) and not isinstance(usd, bool) and math.isfinite(usd)
    if not is_number or not 0 < usd <= _MOST_USD:
        raise DeviceError(
            f"{where}.usd_per_hour is {usd!r}, expected a number above 0, at most {_MOST_USD:g}."
        )
    for key in ("source", "date"):
        if not isinstance(row[key], str) or not row[key]:
            raise DeviceError(f"{where}.{key} must be text, got {row[key]!r}.")
    return Price(usd_per_hour=float(usd), source=row["source"], date=row["date"])
