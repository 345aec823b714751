"""Money: the cheapest device for each variant, and the sentence that a plan makes possible."""

from __future__ import annotations

import math
from dataclasses import dataclass

from remat.runs.evidence import Expense
from remat.runs.reading import reference_of
from remat.runs.records import Run, VariantKind, Verdict
from remat.units import format_usd

# Nobody chooses a device over less than this for a whole training.
_WORTH_A_WORD = 0.01


@dataclass(frozen=True, slots=True)
class Saving:
    """The cheapest way without a plan, if there is one, beside the cheapest with one."""

    without: Expense | None
    planned: Expense


def cheapest(run: Run, variant: str) -> Expense | None:
    """Return the cheapest device that fits the variant, by the price of one whole run."""
    found = [
        e
        for e in run.expenses
        if e.variant == variant and e.fits and e.run_usd is not None and math.isfinite(e.run_usd)
    ]
    return min(found, key=lambda e: e.run_usd or 0.0, default=None)


def saving(run: Run) -> Saving | None:
    """Compare the cheapest device without a plan with the cheapest one under a passed plan."""
    reference = reference_of(run.variants)
    plans = [
        found
        for v in run.variants
        if v.kind is VariantKind.PLANNED and v.verdict is Verdict.PASSED
        if (found := cheapest(run, v.label)) is not None
    ]
    if not plans:
        return None
    best = min(plans, key=lambda e: e.run_usd or 0.0)
    return Saving(None if reference is None else cheapest(run, reference.label), best)


def cheaper_device(run: Run) -> str | None:
    """Say which device a plan makes enough, where that is cheaper than without a plan."""
    found = saving(run)
    if found is None or found.planned.run_usd is None:
        return None
    planned, without = found.planned, found.without
    price = format_usd(found.planned.run_usd)
    if without is None or not without.run_usd:
        return (
            f"Train under {planned.variant} on {planned.device}, {price} for the whole training; "
            "without a plan none of the devices with a price is large enough."
        )
    share = found.planned.run_usd / without.run_usd
    if share >= 0.995 or without.run_usd < _WORTH_A_WORD:
        return None
    return (
        f"Train under {planned.variant} on {planned.device}: the same training costs {price}, "
        f"{share:.2f} of the {format_usd(without.run_usd)} that it takes on {without.device} "
        "without a plan."
    )


def dearer(run: Run, label: str) -> str:
    """Say what the same training costs under a plan on the device that is cheapest without one.

    A clause that begins with a comma; empty where a price is missing or too small to matter.
    """
    reference = reference_of(run.variants)
    base = cheapest(run, reference.label) if reference is not None else None
    if base is None or not base.run_usd or base.run_usd < _WORTH_A_WORD:
        return ""
    for e in run.expenses:
        is_twin = (e.variant, e.device, e.offer) == (label, base.device, base.offer)
        if is_twin and e.fits and e.run_usd is not None and math.isfinite(e.run_usd):
            prices = f"{format_usd(e.run_usd)} instead of {format_usd(base.run_usd)}"
            return f", and on {e.device} the whole training costs {prices}"
    return ""


def saving_arithmetic(run: Run) -> tuple[str, ...]:
    """Show how the prices of the sentence about the cheaper device follow, a line each."""
    found = saving(run)
    if found is None:
        return ()
    rows = (found.without, found.planned)
    return tuple(
        f"{row.variant} on {row.device}: {row.arithmetic}" for row in rows if row and row.arithmetic
    )
