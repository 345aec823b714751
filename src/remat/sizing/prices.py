"""What a device costs: the package's table, with those of a user's file over it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from remat.cost.tables import read_table
from remat.errors import DeviceError
from remat.sizing.offers import Offer, Price, PriceTable, Purchase, Rate, Terms

SCHEMA_VERSION: Final = 1
_PACKAGE_FILE: Final = Path(__file__).with_name("prices.toml")
_MOST_USD: Final = 10_000.0
_MOST_PURCHASE: Final = 10_000_000.0
_MOST_WATTS: Final = 100_000.0
_PRICE: Final = {"usd_per_hour": _MOST_USD}
_PURCHASE: Final = {
    "purchase_usd": _MOST_PURCHASE,
    "life_years": 100.0,
    "utilization": 1.0,
    "usd_per_kwh": 100.0,
    "watts": _MOST_WATTS,
}
# Single rows: field of the table -> its figure, and the most that it can be.
_RATES: Final = {
    "carbon": ("kilograms_per_kwh", 10.0),
    "storage": ("usd_per_gb_month", 100.0),
    "transfer": ("usd_per_gb", 100.0),
}
_TABLES: Final = ("price", "offer", "power", *_RATES)
_SOURCED: Final = ("source", "date")
_VERIFIED: Final = "verified"

# Any: what TOML holds is checked here before it becomes a row.


def load_price_table(path: str | os.PathLike[str] | None = None) -> PriceTable:
    """Return prices, further offers, power, carbon, storage and transfer.

    Rows of a user's file replace those of the package for the same device; an offer replaces the
    one of the same device and name, any other is added.

    Raises
    ------
    DeviceError: if a file cannot be read, has a field that is not known, or lacks one, or a figure
        is not above 0; the message names file, row and field.
    """
    found = _read(_PACKAGE_FILE)
    return found if path is None else _over(found, _read(Path(path)))


def load_prices(path: str | os.PathLike[str] | None = None) -> dict[str, Price]:
    """Return the prices on demand by device's name; errors as `load_price_table`."""
    return dict(load_price_table(path).prices)


def _over(below: PriceTable, above: PriceTable) -> PriceTable:
    others = dict(below.others)
    for device, offers in above.others.items():
        names = {offer.name for offer in offers}
        kept = [offer for offer in others.get(device, ()) if offer.name not in names]
        others[device] = (*kept, *offers)
    return PriceTable(
        prices={**below.prices, **above.prices},
        others=others,
        watts={**below.watts, **above.watts},
        carbon=above.carbon or below.carbon,
        storage=above.storage or below.storage,
        transfer=above.transfer or below.transfer,
    )


def _read(path: Path) -> PriceTable:
    data = read_table(path, "price table", schema_version=SCHEMA_VERSION)
    for key in data:
        if key not in _TABLES:
            raise DeviceError(
                f"{path}: {key} is not a known field: expected schema_version, "
                f"{', '.join(_TABLES)}."
            )
    prices, watts = _rows(data, "price", path), _rows(data, "power", path)
    rates = {}
    for label, (figure, most) in _RATES.items():
        if label in data:
            if not isinstance(data[label], dict):
                raise DeviceError(f"{path}: {label} must be a table, got {data[label]!r}.")
            rates[label] = _rate(data[label], figure, most, f"{path}: {label}")
    return PriceTable(
        prices={name: _price(row, f"{path}: price.{name}") for name, row in prices.items()},
        others=_offers(data.get("offer", {}), path),
        watts={
            name: _rate(row, "watts", _MOST_WATTS, f"{path}: power.{name}")
            for name, row in watts.items()
        },
        **rates,
    )


def _rows(data: Mapping[str, Any], label: str, path: Path) -> dict[str, dict[str, Any]]:
    rows = data.get(label, {})
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise DeviceError(f"{path}: {label} must be a table of devices.")
    return rows


def _price(row: Mapping[str, Any], where: str) -> Price:
    _check(row, _PRICE, where)
    return Price(usd_per_hour=float(row["usd_per_hour"]), **_sourced(row))


def _rate(row: Mapping[str, Any], figure: str, most: float, where: str) -> Rate:
    _check(row, {figure: most}, where)
    return Rate(value=float(row[figure]), **_sourced(row))


def _sourced(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a checked row says of where its figure is from."""
    return {
        "source": row["source"], "date": row["date"], "is_verified": row.get(_VERIFIED, True)
    }  # fmt: skip


def _offers(found: Any, path: Path) -> dict[str, tuple[Offer, ...]]:
    if not isinstance(found, dict) or not all(isinstance(rows, list) for rows in found.values()):
        raise DeviceError(f"{path}: offer must be lists by device, such as [[offer.T4]].")
    return {
        device: tuple(
            _offer(device, row, f"{path}: offer.{device}[{number}]")
            for number, row in enumerate(rows, start=1)
        )
        for device, rows in found.items()
    }


def _offer(device: str, row: Any, where: str) -> Offer:
    if not isinstance(row, dict):
        raise DeviceError(f"{where} must be a table, got {row!r}.")
    allowed = [terms.value for terms in Terms]
    if row.get("terms") not in allowed:
        raise DeviceError(
            f"{where}.terms is {row.get('terms')!r}, expected one of {', '.join(allowed)}."
        )
    terms = Terms(row["terms"])
    _check(row, _PURCHASE if terms.is_bought else _PRICE, where, texts=("name", "terms"))
    if not terms.is_bought:
        price = Price(usd_per_hour=float(row["usd_per_hour"]), **_sourced(row))
        return Offer(device=device, name=row["name"], terms=terms, price=price)
    purchase = Purchase(**{key: float(row[key]) for key in _PURCHASE})
    price = Price(usd_per_hour=purchase.usd_per_hour, **_sourced(row))
    return Offer(device=device, name=row["name"], terms=terms, price=price, purchase=purchase)


def _check(
    row: Mapping[str, Any], figures: Mapping[str, float], where: str, texts: tuple[str, ...] = ()
) -> None:
    """Refuse a row with a field too many or too few, or a figure that cannot be."""
    known = (*texts, *figures, *_SOURCED)
    for key in row:
        if key not in (*known, _VERIFIED):
            raise DeviceError(f"{where}.{key} is not a known field: expected {', '.join(known)}.")
    for key in known:
        if key not in row:
            raise DeviceError(f"{where}.{key} is missing.")
    for key, most in figures.items():
        value = row[key]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not 0 < value <= most:
            raise DeviceError(
                f"{where}.{key} is {value!r}, expected a number above 0, at most {most:g}."
            )
    for key in (*texts, *_SOURCED):
        if not isinstance(row[key], str) or not row[key]:
            raise DeviceError(f"{where}.{key} must be text, got {row[key]!r}.")
    if not isinstance(row.get(_VERIFIED, True), bool):
        raise DeviceError(f"{where}.{_VERIFIED} is {row[_VERIFIED]!r}, expected true or false.")
