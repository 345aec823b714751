"""What fits where as a rich table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remat.sizing.records import DeviceFit, Size, Survey
from remat.units import format_bytes, format_rate, format_seconds, format_usd

_WHAT = {
    "sequence": "tokens per sequence",
    "image size": "image size in pixels",
    "depth": "number of layers",
}


def survey_view(survey: Survey) -> RenderableType:
    """Show the largest size of each device and mode, the fastest mode, and the cheapest device."""
    what = _WHAT.get(survey.dimension, survey.dimension)
    on = f", sharded over {survey.shards} devices" if survey.shards > 1 else ""
    sizes = _table("device", "memory", "keep all", "all blocks", "planned")
    times = _table("device", "fastest", "step", "per second", "epoch", "cost")
    for row in survey.devices:
        name = Text(row.device, style="bold green" if row.device == survey.cheapest else "")
        sizes.add_row(
            name, format_bytes(row.available_bytes), *(_largest(size, row) for size in row.sizes)
        )
        if row.best is not None:
            times.add_row(name, *_times(row.best, row.price_mark))
    parts: list[RenderableType] = [
        Text.assemble((survey.workload, "bold"), f" · largest {what} that fits{on}"),
        Text(),
        sizes,
        Text(),
        times,
        Text(),
        Text(f"At its largest {what}, by {survey.cost_source}.", style="dim"),
    ]  # fmt: skip
    if survey.cheapest is not None:
        parts.append(
            Text.assemble(
                f"Cheapest for the {survey.dimension} of {survey.asked} asked for: ",
                (survey.cheapest, "bold green"),
            )
        )
    parts += [Padding(Text(f"- {remark}"), (0, 0, 0, 2)) for remark in survey.notes]
    priced = [_price(row) for row in survey.devices if row.usd_per_hour is not None]
    parts += [Text(), *priced] if priced else []
    parts.append(Text())
    return Group(*parts)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _times(best: Size, price_mark: str) -> tuple[str, ...]:
    return (
        best.mode.value,
        format_seconds(best.step_seconds),
        format_rate(best.samples_per_second),
        "" if best.epoch_seconds is None else format_seconds(best.epoch_seconds),
        "" if best.epoch_usd is None else format_usd(best.epoch_usd) + price_mark,
    )


def _price(row: DeviceFit) -> Text:
    """Say what an hour costs, by whom and when."""
    said = f"{row.device}: {format_usd(row.usd_per_hour or 0)} an hour, {row.price_source}"
    return Text(said if row.is_price_verified else f"* {said}; not verified", style="dim")


def _largest(size: Size, row: DeviceFit) -> Text:
    if size.largest:
        return Text(f"{size.largest:,}")
    missing = format_bytes(size.needed_bytes - row.available_bytes)
    return Text(f"{missing} short", style="red")
