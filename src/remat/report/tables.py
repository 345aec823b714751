"""Tables as data: the same cells for the page, for Markdown and for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from remat.runs.evidence import Interval
from remat.runs.reading import MINUS, format_value
from remat.units import format_rate, format_seconds, format_usd

NOTHING = "\N{EN DASH}"
_LONG = 12
_MOST_METRICS = 4
_Block = Sequence[tuple[str, ...]]
_TELLING = ("perplexity", "accuracy", "mean_iou", "r2", "loss", "calibration_error", "macro_f1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts; `words` are the columns that hold words and not figures.

    One that `is_long` may be folded away where there is little room.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset({0})

    @property
    def is_long(self) -> bool:
        """More than a reader takes in at a glance."""
        return len(self.rows) > _LONG


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the evidence: what it shows, how it was measured, its tables and its gaps.

    `working` shows how figures follow from others, for who wants to check.
    """

    key: str
    title: str
    lead: str
    how: str = ""
    tables: tuple[Table, ...] = ()
    remarks: tuple[str, ...] = ()
    working: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: Iterable[int] = (0,)
) -> tuple[Table, ...]:
    """Make a table, or none where it would have no row; a column without a figure is left out."""
    listed = [tuple(row) for row in rows]
    used = [i for i in range(len(columns)) if any(row[i] not in (NOTHING, "") for row in listed)]
    made = Table(
        title=title,
        columns=tuple(columns[i] for i in used),
        rows=tuple(tuple(row[i] for i in used) for row in listed),
        words=frozenset(new for new, old in enumerate(used) if old in set(words)),
    )
    return (made,) if listed else ()


def number(value: float | None, digits: int = 4) -> str:
    """Write a number to so many significant digits; a dash where there is none."""
    return _told(value, lambda known: f"{known:.{digits}g}")


def fixed(value: float | None, digits: int = 4) -> str:
    """Write a number with so many digits after the point, so that a column lines up."""
    return _told(value, lambda known: f"{known:.{digits}f}")


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share in percent; a dash where there is none."""
    return _told(value, lambda known: f"{known:.{digits}%}")


def usd(value: float | None) -> str:
    """Write a sum of money; below a cent with its first two digits that are not 0."""

    def write(known: float) -> str:
        if not 0 < known < 0.01:
            return format_usd(known)
        return f"${known:.{1 - math.floor(math.log10(known))}f}"

    return _told(value, write)


def rate(value: float | None) -> str:
    """Write a rate; a dash where there is none."""
    return _told(value, format_rate)


def _told(value: float | None, write: Callable[[float], str]) -> str:
    """Write a value with a true minus; what is no number or has no end is said in words."""
    if value is None:
        return NOTHING
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    return write(value).replace("-", MINUS)


def seconds(value: float | None) -> str:
    """Write a duration; a dash where there is none."""
    return _told(value, format_seconds)


def metric(name: str, value: float | None) -> str:
    """Write the value of a metric; a dash where there is none."""
    return _told(value, lambda known: format_value(name, known))


def metric_interval(name: str, found: Interval | None) -> str:
    """Write a metric with its confidence interval."""
    if found is None:
        return NOTHING
    low, high = metric(name, found.low), metric(name, found.high)
    return f"{metric(name, found.value)} [{low}, {high}]"


def p_value(value: float | None) -> str:
    """Write a p-value: no more digits than it is worth."""
    return _told(value, lambda known: "< 0.001" if known < 0.001 else f"{known:.3f}")


def shown_metrics(names: Iterable[str]) -> list[str]:
    """Choose the metrics that a table has room for, the most telling first."""
    return all_metrics(names)[:_MOST_METRICS]


def all_metrics(names: Iterable[str]) -> list[str]:
    """Put metrics in order, the most telling first."""
    found = set(names)
    return [*(name for name in _TELLING if name in found), *sorted(found - set(_TELLING))]


def said_once(blocks: Mapping[str, _Block]) -> dict[str, _Block]:
    """Give the rows of each variant, or one block for all where they are equal in every cell."""
    if len(blocks) > 1 and len({str(block) for block in blocks.values()}) == 1:
        return {f"all {len(blocks)} variants": next(iter(blocks.values()))}
    return dict(blocks)


def yes(is_so: bool | None) -> str:
    """Write a truth for people."""
    return NOTHING if is_so is None else ("yes" if is_so else "no")
