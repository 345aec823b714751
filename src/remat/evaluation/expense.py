"""Time, money, energy and CO2 of each variant on each device, from step times and price rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from remat.cost.devices import Device
from remat.runs.evidence import Expense, PriceSource
from remat.sizing.offers import Offer, Price, PriceTable, Rate, Terms
from remat.units import format_bytes, format_seconds

_HOUR = 3600.0
_JOULES_PER_KWH = 3.6e6
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one step of a variant takes on a device, by the cost model and the allocator's."""

    roofline_seconds: float
    needed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Costed:
    """One variant as it was measured here.

    Arguments
    ---------
    step_seconds: measured on this machine; `roofline_seconds` is the cost model's for the same.
    needs: what a step takes on each other device, by name.
    target_steps: steps until the target quality; `None` where it was not reached.
    joules_per_step: measured here, where there is a counter.
    """

    variant: str
    is_reference: bool
    step_seconds: float
    roofline_seconds: float
    measured_peak_bytes: int | None = None
    needs: Mapping[str, Need] = field(default_factory=dict)
    target_steps: int | None = None
    joules_per_step: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long training is, what it leaves and what quality is aimed at, for every variant."""

    steps_per_epoch: int
    epochs: int
    stored_bytes: int
    target: str = ""


def price_variants(
    costed: Sequence[Costed],
    devices: Sequence[Device],
    table: PriceTable,
    schedule: Schedule,
    *,
    here: Device,
    counter: str = "",
) -> tuple[Expense, ...]:
    """Price every variant on this machine's kind of device and on the devices given.

    On `here` seconds are those measured. On another device they are those times the ratio of the
    two devices' rooflines for that variant's own ops: a machine that reaches half of its roofline
    is taken to reach half of the other's as well. Money is seconds times an hour's price, a run's
    also storage for a month and one transfer out of a cloud. Energy is the device's highest power
    times seconds, unless `counter` names what measured it here. Exact in its inputs.
    """
    listed = [here, *(device for device in devices if device.name != here.name)]
    rows = [
        row
        for one in costed
        for device in listed
        for row in _rows(one, device, table, schedule, here=here, counter=counter)
    ]
    return _with_cheapest(rows, costed, {device.name: device for device in listed})


def _rows(
    one: Costed,
    device: Device,
    table: PriceTable,
    schedule: Schedule,
    *,
    here: Device,
    counter: str,
) -> Iterable[Expense]:
    is_here = device.name == here.name
    need = one.needs.get(device.name)
    if not is_here and need is None:
        return
    row = Expense(
        variant=one.variant, device=device.name, offer="", fits=True, is_measured=is_here,
        available_bytes=device.available_bytes,
        needed_bytes=one.measured_peak_bytes if need is None else need.needed_bytes,
    )  # fmt: skip
    if need is not None and not is_here and need.needed_bytes > device.available_bytes:
        text = (
            f"does not fit: needs {format_bytes(need.needed_bytes)} of "
            f"{format_bytes(device.available_bytes)}"
        )
        yield row.model_copy(update={"fits": False, "arithmetic": text})
        return
    seconds, said = one.step_seconds, f"step {format_seconds(one.step_seconds)}, measured here"
    if need is not None and not is_here:
        ratio = need.roofline_seconds / one.roofline_seconds
        seconds = one.step_seconds * ratio
        said = (
            f"step {format_seconds(seconds)} = {format_seconds(one.step_seconds)} measured here "
            f"x {ratio:.4g} (roofline of {device.name} over that of {here.name})"
        )
    timed = _timed(row, one, seconds, schedule)
    assert timed.run_seconds is not None
    run = (
        f"run {format_seconds(timed.run_seconds)} = step x {schedule.steps_per_epoch} steps x "
        f"{schedule.epochs} {'epoch' if schedule.epochs == 1 else 'epochs'}"
    )
    if timed.target_seconds is not None:
        run += f", {schedule.target} after {one.target_steps} steps"
    powered, energy = _powered(timed, one, table, schedule, counter=counter if is_here else "")
    offers = table.offers(device.name)
    for offer in offers:
        priced, money = _priced(powered, offer, table, schedule)
        yield priced.model_copy(update={"arithmetic": _joined(said, run, money, energy)})
    if not offers:
        text = _joined(said, run, f"no price of {device.name} is in the table", energy)
        yield powered.model_copy(update={"arithmetic": text})


def _timed(row: Expense, one: Costed, seconds: float, schedule: Schedule) -> Expense:
    epoch = seconds * schedule.steps_per_epoch
    return row.model_copy(
        update={
            "step_seconds": seconds,
            "epoch_seconds": epoch,
            "run_seconds": epoch * schedule.epochs,
            "target_seconds": None if one.target_steps is None else seconds * one.target_steps,
        }
    )


def _powered(
    row: Expense, one: Costed, table: PriceTable, schedule: Schedule, *, counter: str
) -> tuple[Expense, str]:
    """Add the energy of a run and what it emits, and say how they follow."""
    assert row.run_seconds is not None
    is_verified = table.carbon is None or table.carbon.is_verified
    if counter and one.joules_per_step is not None:
        steps = schedule.steps_per_epoch * schedule.epochs
        hours = one.joules_per_step * steps / _JOULES_PER_KWH
        said, source = f"{one.joules_per_step:.4g} J a step measured ({counter})", counter
    elif (watts := table.watts.get(row.device)) is not None:
        hours = watts.value / 1000 * row.run_seconds / _HOUR
        source = f"estimated from {watts.value:g} W ({watts.source}, {watts.date})"
        said = f"{watts.value:g} W x run"
        is_verified = is_verified and watts.is_verified
    else:
        return row, ""
    emitted = None if table.carbon is None else hours * table.carbon.value
    text = f"energy {said} = {hours:.3g} kWh"
    if table.carbon is not None:
        text += f", x {table.carbon.value:g} kg/kWh = {emitted:.3g} kg CO2"
    update = {
        "kilowatt_hours": hours,
        "kilograms_co2": emitted,
        "is_energy_measured": bool(counter) and one.joules_per_step is not None,
        "energy_source": source,
        "is_energy_verified": is_verified,
    }
    return row.model_copy(update=update), text


def _priced(
    row: Expense, offer: Offer, table: PriceTable, schedule: Schedule
) -> tuple[Expense, str]:
    """Add the money of one offer, and say how it follows."""
    assert row.run_seconds is not None
    assert row.epoch_seconds is not None
    hourly = offer.price.usd_per_hour
    run_usd = row.run_seconds / _HOUR * hourly
    text = f"x {hourly:.4g} USD/h = {run_usd:.3g} USD"
    if offer.purchase is not None:
        text = f"{text} ({offer.purchase.arithmetic})"
    storage = transfer = None
    is_verified = offer.price.is_verified
    if offer.terms in (Terms.CLOUD, Terms.SPOT):
        size = schedule.stored_bytes / _GB
        storage = None if table.storage is None else size * table.storage.value
        transfer = None if table.transfer is None else size * table.transfer.value
        extra = (storage or 0.0) + (transfer or 0.0)
        run_usd += extra
        is_verified = is_verified and all(
            rate.is_verified for rate in (table.storage, table.transfer) if rate is not None
        )
        text += f", + {size:.3g} GB stored a month and moved out once = {extra:.3g} USD"
    target = row.target_seconds
    update = {
        "offer": offer.label,
        "usd_per_hour": hourly,
        "epoch_usd": row.epoch_seconds / _HOUR * hourly,
        "run_usd": run_usd,
        "target_usd": None if target is None else target / _HOUR * hourly,
        "storage_usd": storage,
        "transfer_usd": transfer,
        "price_source": offer.price.source,
        "price_date": offer.price.date,
        "is_price_verified": is_verified,
    }
    return row.model_copy(update=update), text


def price_sources(rows: Sequence[Expense], table: PriceTable) -> tuple[PriceSource, ...]:
    """List where each figure of the table that the rows follow from is from, each once."""
    found: list[PriceSource] = []

    def add(name: str, value: float, unit: str, of: Price | Rate) -> None:
        found.append(
            PriceSource(
                name=name, value=value, unit=unit, source=of.source, date=of.date,
                is_verified=of.is_verified,
            )
        )  # fmt: skip

    used = {(row.device, row.offer) for row in rows if row.offer}
    for device in dict.fromkeys(row.device for row in rows):
        for offer in table.offers(device):
            if (device, offer.label) in used:
                price = offer.price
                add(f"{device}, {offer.label}", price.usd_per_hour, "USD an hour", price)
    for device in dict.fromkeys(r.device for r in rows if r.fits and not r.is_energy_measured):
        if (watts := table.watts.get(device)) is not None:
            add(f"{device}, highest power", watts.value, "W", watts)
    rates = (
        ("electricity's CO2", table.carbon, "kg per kWh"),
        ("storage", table.storage, "USD per GB and month"),
        ("transfer out of a cloud", table.transfer, "USD per GB"),
    )
    for name, rate, unit in rates:
        if rate is not None and found:
            add(name, rate.value, unit, rate)
    return tuple(found)


def _with_cheapest(
    rows: Sequence[Expense], costed: Sequence[Costed], devices: Mapping[str, Device]
) -> tuple[Expense, ...]:
    """Mark each variant's cheapest row, and say what it costs against the run without a plan."""
    cheapest: dict[str, Expense] = {}
    for row in rows:
        if row.fits and row.run_usd is not None:
            best = cheapest.get(row.variant)
            if best is None or best.run_usd is None or row.run_usd < best.run_usd:
                cheapest[row.variant] = row
    reference = next((one.variant for one in costed if one.is_reference), None)
    found = []
    for row in rows:
        marked = row
        if cheapest.get(row.variant) is row:
            base = None if reference is None else cheapest.get(reference)
            sentence = _sentence(row, base, devices, is_reference=row.variant == reference)
            update = {"is_cheapest": True, "arithmetic": _joined(row.arithmetic, sentence)}
            marked = row.model_copy(update=update)
        found.append(marked)
    return tuple(found)


def _sentence(
    row: Expense, base: Expense | None, devices: Mapping[str, Device], *, is_reference: bool
) -> str:
    assert row.run_usd is not None
    memory = devices[row.device].memory_bytes
    size = f"{memory / _GB:.0f} GB" if memory >= _GB else f"{memory / 1e6:.0f} MB"
    card = f"{row.device} ({size})"
    if is_reference:
        return f"Cheapest of the devices that it fits: {card} for {row.run_usd:.3g} USD a run."
    if base is None or base.run_usd is None:
        return f"Fits {card} for {row.run_usd:.3g} USD a run; without a plan, none of the devices."
    ratio = row.run_usd / base.run_usd
    how = (
        f"fits {card} at {ratio:.2f} of the price: {row.run_usd:.3g} USD / {base.run_usd:.3g} USD "
        f"on {base.device} without a plan"
    )
    if ratio < 1:
        return f"The same run {how}."
    return f"Under this plan the run {how}, so it saves no money."


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
