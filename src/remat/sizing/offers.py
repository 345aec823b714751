"""On which terms a device can be had, what it draws, and what its electricity emits: table rows."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_HOURS_PER_YEAR: Final = 24 * 365.0


class Terms(str, enum.Enum):
    """On which terms a device is had."""

    CLOUD = "cloud"
    SPOT = "spot"
    OWNED = "owned"
    EDGE = "edge"

    @property
    def is_bought(self) -> bool:
        """Whether the device is bought, not rented by the hour."""
        return self in (Terms.OWNED, Terms.EDGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one device costs an hour, by whom and when; whether the source was read is said."""

    usd_per_hour: float
    source: str
    date: str
    is_verified: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchase:
    """What makes up an hour of a device that is bought.

    `utilization` is the share of its life in which it works; `watts` are drawn while it does.
    """

    purchase_usd: float
    life_years: float
    utilization: float
    usd_per_kwh: float
    watts: float

    @property
    def usd_per_hour(self) -> float:
        """Purchase over the hours worked, and the electricity of one of them."""
        worked = self.life_years * _HOURS_PER_YEAR * self.utilization
        return self.purchase_usd / worked + self.watts / 1000 * self.usd_per_kwh

    @property
    def arithmetic(self) -> str:
        """How an hour's price follows, for people."""
        return (
            f"{self.purchase_usd:,.0f} USD / ({self.life_years:g} years x 8,760 h x "
            f"{self.utilization:.0%} in use) + {self.watts:g} W x {self.usd_per_kwh:g} USD/kWh "
            f"= {self.usd_per_hour:.4g} USD/h"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One way to have a device: who offers it on which terms, and an hour's price."""

    device: str
    name: str
    terms: Terms
    price: Price
    purchase: Purchase | None = None

    @property
    def label(self) -> str:
        """Terms and name, for people."""
        return f"{self.terms.value}: {self.name}" if self.name else self.terms.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A figure of the table with its source and date: watts, USD per GB, or kg per kWh."""

    value: float
    source: str
    date: str
    is_verified: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """Every offer by device, and what storage, transfer and electricity come to.

    Arguments
    ---------
    prices: the price on demand by device, one each; it is also the first of its offers.
    others: further offers by device.
    watts: what a device draws at most, by device.
    carbon: kilograms of CO2 equivalents per kilowatt hour.
    storage: USD per GB and month.
    transfer: USD per GB that leaves the cloud.
    """

    prices: Mapping[str, Price]
    others: Mapping[str, tuple[Offer, ...]] = field(default_factory=dict)
    watts: Mapping[str, Rate] = field(default_factory=dict)
    carbon: Rate | None = None
    storage: Rate | None = None
    transfer: Rate | None = None

    def offers(self, device: str) -> tuple[Offer, ...]:
        """Return the device's offers: on demand first, then by an hour's price."""
        others = sorted(self.others.get(device, ()), key=lambda offer: offer.price.usd_per_hour)
        on_demand = self.prices.get(device)
        if on_demand is None:
            return tuple(others)
        first = Offer(device=device, name="on demand", terms=Terms.CLOUD, price=on_demand)
        return (first, *others)
