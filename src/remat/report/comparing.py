"""A comparison of two runs for people: the same rows in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remat.report.view import NOTHING, signed_percent
from remat.runs.comparison import Comparison, VariantComparison
from remat.runs.reading import format_value, metric_name
from remat.units import format_bytes, format_seconds

_HEADINGS = ("variant", "peak", "change", "step time", "change", "quality", "verdict")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One variant in both runs, as text, in the order of the headings."""

    label: str
    peak: str
    peak_change: str
    time: str
    time_change: str
    quality: str
    verdict: str


def comparison_view(comparison: Comparison) -> RenderableType:
    """Show two runs side by side in the terminal: figures, what grew and where, other settings."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for number, heading in enumerate(_HEADINGS):
        is_figure = 0 < number < len(_HEADINGS) - 1
        table.add_column(heading, justify="right" if is_figure else "left", overflow="fold")
    for row in _rows(comparison):
        table.add_row(*(Text(cell) for cell in astuple(row)))
    parts: list[RenderableType] = [
        Text.assemble((comparison.before, "bold"), "  →  ", (comparison.after, "bold")),
        Text(),
        table,
    ]
    for title, remarks in (
        ("What grew, and where", _growths(comparison)),
        ("Plans", _plans(comparison)),
        ("Not the same", _settings(comparison)),
    ):
        if remarks:
            parts += [Text(), Text(title, style="bold")]
            parts += [Padding(Text(f"- {remark}"), (0, 0, 0, 2)) for remark in remarks]
    return Group(*parts, Text())


def comparison_markdown(comparison: Comparison) -> str:
    """Write the same as Markdown, for a ticket or a pull request."""
    lines = [f"# {comparison.before} → {comparison.after}", "", markdown_line(_HEADINGS)]
    lines.append(markdown_line(["---", *["---:"] * (len(_HEADINGS) - 2), "---"]))
    lines += [markdown_line(astuple(row)) for row in _rows(comparison)]
    for title, remarks in (
        ("What grew, and where", _growths(comparison)),
        ("Plans", _plans(comparison)),
        ("Not the same", _settings(comparison)),
    ):
        if remarks:
            lines += ["", f"## {title}", "", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines) + "\n"


def markdown_line(cells: Sequence[str]) -> str:
    """Write one line of a Markdown table; a bar or a line break in a cell does not end it."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _rows(comparison: Comparison) -> Iterator[_Row]:
    for variant in comparison.variants:
        if variant.only_in is not None:
            rest = [NOTHING] * (len(_HEADINGS) - 2)
            cells = (variant.label, *rest, f"only in {variant.only_in}")
            yield _Row(**dict(zip(_Row.__dataclass_fields__, cells, strict=True)))
            continue
        yield _Row(
            label=variant.label,
            peak=_two(variant.before_peak_bytes, variant.after_peak_bytes, format_bytes),
            peak_change=_peak_change(variant),
            time=_two(variant.before_seconds, variant.after_seconds, format_seconds),
            time_change=_time_change(variant),
            quality=_quality(variant),
            verdict=_verdict(variant),
        )


def _two(before: float | None, after: float | None, write: Callable[[float], str]) -> str:
    first, second = (NOTHING if one is None else write(one) for one in (before, after))
    return first if first == second else f"{first} → {second}"


def _peak_change(variant: VariantComparison) -> str:
    before, after = variant.before_peak_bytes, variant.after_peak_bytes
    if before is None or after is None:
        return NOTHING
    return "equal" if before == after else signed_percent(after / before - 1, 1)


def _time_change(variant: VariantComparison) -> str:
    if variant.time_growth is None or variant.time_noise is None:
        return NOTHING
    change = signed_percent(variant.time_growth)
    return change if variant.is_time_clear else f"{change}, within noise"


def _quality(variant: VariantComparison) -> str:
    by_name = {change.metric: change for change in variant.metrics}
    for name in ("perplexity", "accuracy", "r2", "loss"):
        if name in by_name:
            found = by_name[name]
            before, after = (format_value(name, value) for value in (found.before, found.after))
            both = before if found.before == found.after else f"{before} → {after}"
            return f"{both} {metric_name(name)}"
    return NOTHING


def _verdict(variant: VariantComparison) -> str:
    before, after = variant.before_verdict, variant.after_verdict
    return f"{after}" if before == after else f"{before} → {after}"


def _growths(comparison: Comparison) -> list[str]:
    return [f"{v.label}: peak {v.growth}" for v in comparison.variants if v.growth]


def _plans(comparison: Comparison) -> list[str]:
    return [
        f"{v.label}: plan {v.before_plan[:8]} {'; '.join(v.plan_changes)} (now {v.after_plan[:8]})"
        for v in comparison.variants
        if v.plan_changes and v.before_plan and v.after_plan
    ]


def _settings(comparison: Comparison) -> list[str]:
    return [f"{one.name}: {one.before} → {one.after}" for one in comparison.settings]
