"""What fits where as a rich table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remat.sizing.records import DeviceFit, Size, Survey
from remat.units import format_bytes, format_seconds


def survey_view(survey: Survey) -> RenderableType:
    """Show the largest size of each device and mode, the fastest mode, and the cheapest device."""
    what = "batch" if survey.dimension == "batch" else "tokens per sequence"
    on = f", sharded over {survey.shards} devices" if survey.shards > 1 else ""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("device", no_wrap=True)
    for title in (
        "memory", "keep all", "all blocks", "planned", "step", "per second", "epoch", "cost",
    ):  # fmt: skip
        table.add_column(title, justify="right", no_wrap=True)
    for row in survey.devices:
        table.add_row(*_cells(row, is_cheapest=row.device == survey.cheapest))
    parts: list[RenderableType] = [
        Text.assemble((survey.workload, "bold"), f" · largest {what} that fits{on}"),
        Text(),
        table,
        Text(),
        Text("Step, examples per second, epoch and cost: of the fastest mode that fits, by "
             f"{survey.cost_source}.", style="dim"),
    ]  # fmt: skip
    if survey.cheapest is not None:
        parts.append(
            Text.assemble(
                f"Cheapest for the {survey.dimension} of {survey.asked} asked for: ",
                (survey.cheapest, "bold green"),
            )
        )
    parts += [Padding(Text(f"- {remark}"), (0, 0, 0, 2)) for remark in survey.notes]
    parts.append(Text())
    return Group(*parts)


def _cells(row: DeviceFit, *, is_cheapest: bool) -> list[Text | str]:
    name = Text(row.device, style="bold green" if is_cheapest else "")
    sizes = [_largest(size, row) for size in row.sizes]
    best = row.best
    if best is None:
        return [name, format_bytes(row.available_bytes), *sizes, "", "", "", ""]
    return [
        name,
        format_bytes(row.available_bytes),
        *sizes,
        format_seconds(best.step_seconds),
        f"{best.samples_per_second:,.0f}"
        if best.samples_per_second >= 100
        else f"{best.samples_per_second:.3g}",
        "" if best.epoch_seconds is None else format_seconds(best.epoch_seconds),
        "" if best.epoch_usd is None else f"${best.epoch_usd:.2f}",
    ]


def _largest(size: Size, row: DeviceFit) -> Text:
    if size.largest:
        return Text(str(size.largest))
    missing = format_bytes(size.needed_bytes - row.available_bytes)
    return Text(f"{missing} short", style="red")
