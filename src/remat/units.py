"""Bytes, seconds and budgets as people write and read them."""

from __future__ import annotations

import math
import re
from typing import Final

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3

_BYTES_PER_UNIT: Final = {
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}
_MOST_DIGITS: Final = 40
_MOST_BYTES: Final = 2**100
_AMOUNT: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]+|%)?\s*", re.ASCII)


def parse_budget(budget: int | str, keep_all_peak_bytes: int | None = None) -> int:
    """Read a memory budget as a positive number of bytes.

    Arguments
    ---------
    budget: `int` bytes, or text such as `"8GiB"`, `"8GB"`, `"800MiB"`, `"8000000"`, or `"60%"` of
        the keep-everything peak.
    keep_all_peak_bytes: what a percentage refers to; `None` where no peak is known.

    Raises
    ------
    BudgetFormatError: if it is not readable, not positive, too large, or a percentage without a
        peak.

    Example
    -------
    >>> parse_budget("2GiB")
    2147483648
    >>> parse_budget("60%", keep_all_peak_bytes=1000)
    600
    """
    from remat.errors import BudgetFormatError

    expected = 'expected a positive number of bytes, as 8000000, "8GiB", "8GB", "800MiB" or "60%"'
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise BudgetFormatError(f"budget {budget!r} is not a size: {expected}.")
    if isinstance(budget, int):
        size = budget
    else:
        match = _AMOUNT.fullmatch(budget)
        unit = (match[2] or "b").lower() if match else ""
        if match is None or (unit != "%" and unit not in _BYTES_PER_UNIT):
            raise BudgetFormatError(f"budget {budget!r} is not a size: {expected}.")
        if len(match[1]) > _MOST_DIGITS:
            raise BudgetFormatError(f"budget {budget[:20]!r}... is too large: {expected}.")
        amount = float(match[1])
        if unit == "%":
            if keep_all_peak_bytes is None:
                raise BudgetFormatError(
                    f"budget {budget!r} is a percentage, but no keep-everything peak is known "
                    "here: give bytes instead."
                )
            size = int(amount / 100 * keep_all_peak_bytes)
        elif match[1].isdecimal():
            size = int(match[1]) * _BYTES_PER_UNIT[unit]
        else:
            size = int(amount * _BYTES_PER_UNIT[unit])
    if size <= 0:
        raise BudgetFormatError(f"budget {str(budget)[:40]!r} is not positive: {expected}.")
    if size > _MOST_BYTES:
        raise BudgetFormatError(f"budget {str(budget)[:40]!r} is too large: {expected}.")
    return size


def parse_host_budget(budget: int | str) -> int:
    """Return the bytes that a budget of host memory amounts to; it cannot be a percentage.

    Raises
    ------
    BudgetFormatError: if it cannot be read; the message quotes what was given.
    """
    from remat.errors import BudgetFormatError

    if isinstance(budget, str) and budget.strip().endswith("%"):
        raise BudgetFormatError(
            f"host budget {budget!r} is a percentage: expected a positive number of bytes, as "
            '4000000000 or "4GiB".'
        )
    try:
        return parse_budget(budget)
    except BudgetFormatError as error:
        raise BudgetFormatError(f"host {error}".replace(', "800MiB" or "60%"', "")) from None


def format_bytes(size: float) -> str:
    """Write a number of bytes for people, in binary units.

    >>> format_bytes(1536), format_bytes(-3 * 1024**2), format_bytes(12)
    ('1.5 KiB', '-3.0 MiB', '12 B')
    """
    magnitude = abs(size)
    for unit, scale in (("TiB", 1024**4), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= scale:
            digits = 2 if unit in ("TiB", "GiB") else 1
            return f"{size / scale:.{digits}f} {unit}"
    return f"{size:.0f} B"


def format_usd(usd: float) -> str:
    """Write a sum of money for people.

    >>> format_usd(1234.5), format_usd(0.002), format_usd(0)
    ('$1,234.50', '< $0.01', '$0.00')
    """
    return "< $0.01" if 0 < usd < 0.01 else f"${usd:,.2f}"


def format_rate(per_second: float) -> str:
    """Write a rate for people: whole numbers from 100 on, three digits below.

    >>> format_rate(92659.3), format_rate(3.14159)
    ('92,659', '3.14')
    """
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def format_seconds(seconds: float) -> str:
    """Write a duration for people; files may hold one that is no number.

    >>> format_seconds(0.0021), format_seconds(75.0), format_seconds(math.nan)
    ('2.1 ms', '1 min 15 s', 'unknown')
    """
    if not math.isfinite(seconds):
        return "unknown"
    if seconds != 0 and abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.1f} ms"
    if abs(seconds) < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
