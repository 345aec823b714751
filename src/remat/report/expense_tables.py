"""The evidence on money: the cheapest device for each variant, every price, and their sources."""

from __future__ import annotations

from remat.report.expense import cheaper_device, cheapest, saving_arithmetic
from remat.report.tables import (
    NOTHING,
    Section,
    Table,
    fixed,
    number,
    seconds,
    table,
    usd,
)
from remat.runs.evidence import Expense
from remat.runs.reading import reference_of
from remat.runs.records import Run
from remat.units import format_bytes

_UNVERIFIED = "\N{DAGGER}"


def expense_section(run: Run) -> Section:
    """Tell what each variant costs; without a table where nothing was priced."""
    first = cheaper_device(run)
    return Section(
        key="expense",
        title="Time and money",
        lead="What each way of training takes on each device with a price.",
        how=_how(run),
        tables=(*_cheapest(run), *_all_expenses(run), *_sources(run)),
        remarks=(first,) if first else (),
        working=saving_arithmetic(run),
    )


def _how(run: Run) -> str:
    """Explain the marks that this run's figures carry, and no others."""
    said = []
    if not all(e.is_measured for e in run.expenses):
        said.append("Seconds marked * come from the cost model, as that device was not at hand.")
    if not all(e.is_energy_measured for e in run.expenses if e.kilowatt_hours is not None):
        said.append("Energy marked * is an estimate from rated power.")
    if not all(e.is_price_verified and e.is_energy_verified for e in run.expenses):
        said.append(
            f"Figures marked {_UNVERIFIED} follow from one that was not found in its source again, "
            "and is as remembered."
        )
    return " ".join(said)


def _cheapest(run: Run) -> tuple[Table, ...]:
    reference = reference_of(run.variants)
    base = cheapest(run, reference.label) if reference is not None else None
    rows = []
    for variant in run.variants:
        best = cheapest(run, variant.label)
        if best is None or best.run_usd is None:
            continue
        share = NOTHING
        if base is not None and base.run_usd and best is not base:
            share = fixed(best.run_usd / base.run_usd, 2)
        star = "" if best.is_measured else "*"
        rows.append(
            (
                variant.label,
                f"{best.device}, {best.offer}",
                NOTHING if best.run_seconds is None else seconds(best.run_seconds) + star,
                _usd(best, best.usd_per_hour),
                _usd(best, best.run_usd),
                share,
            )
        )
    columns = ("Variant", "Device", "Whole run", "Per hour", "Price", "Of the price without a plan")
    return table("The cheapest device for each variant", columns, rows, words=(0, 1))


def _all_expenses(run: Run) -> tuple[Table, ...]:
    columns = (
        "Variant", "Device", "Needs", "One step", "One epoch", "Whole run", "To target",
        "One epoch, $", "Whole run, $", "To target, $", "Energy", "CO₂",
    )  # fmt: skip
    rows = (_expense_cells(e) for v in run.variants for e in run.expenses if e.variant == v.label)
    return table("By variant and device", columns, rows, words=(0, 1))


def _expense_cells(e: Expense) -> tuple[str, ...]:
    star = "" if e.is_measured else "*"

    def timed(value: float | None) -> str:
        return NOTHING if value is None else seconds(value) + star

    marks = f"{'' if e.is_energy_measured else '*'}{'' if e.is_energy_verified else _UNVERIFIED}"
    energy = _scaled(e.kilowatt_hours, "kWh", "Wh", marks)
    carbon = _scaled(e.kilograms_co2, "kg", "g", marks)
    needs = NOTHING if e.needed_bytes is None else format_bytes(e.needed_bytes)
    if not e.fits:
        needs = f"does not fit: {needs}" if e.needed_bytes is not None else "does not fit"
    device = f"{e.device}, {e.offer}" if e.offer else e.device
    return (
        e.variant, device, needs, timed(e.step_seconds), timed(e.epoch_seconds),
        timed(e.run_seconds), timed(e.target_seconds), _usd(e, e.epoch_usd), _usd(e, e.run_usd),
        _usd(e, e.target_usd), energy, carbon,
    )  # fmt: skip


def _scaled(value: float | None, unit: str, thousandth: str, marks: str) -> str:
    """Write a quantity in its unit, or in thousandths of it where it is small."""
    if value is None:
        return NOTHING
    if value >= 0.1:
        return f"{number(value, 2)} {unit}{marks}"
    return f"{number(1000 * value, 2)} {thousandth}{marks}"


def _usd(e: Expense, value: float | None) -> str:
    """Write a sum of money, marked where a price in it was not verified."""
    mark = "" if value is None or e.is_price_verified else _UNVERIFIED
    return f"{usd(value)}{mark}"


def _sources(run: Run) -> tuple[Table, ...]:
    rows = (
        (
            one.name if one.is_verified else f"{one.name}{_UNVERIFIED}",
            f"{number(one.value)} {one.unit}",
            one.source,
            one.date,
            "yes" if one.is_verified else "no",
        )
        for one in run.price_sources
    )
    columns = ("Figure", "Value", "Source", "Date", "Verified")
    return table("Where prices, power and rates are from", columns, rows, words=(0, 2, 3, 4))
