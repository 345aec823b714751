"""A sweep for the terminal: what each variant took and reached on each device."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from remat.report.view import NOTHING
from remat.runs.across import DeviceResult
from remat.runs.reading import format_value, metric_name
from remat.units import format_bytes, format_seconds

_HEADINGS = ("device", "variant", "runs", "peak", "step time", "quality", "losses")


def sweep_view(results: Sequence[DeviceResult]) -> RenderableType:
    """Show the results of a sweep, a line for each device and variant."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for heading in _HEADINGS:
        is_figure = heading in _HEADINGS[2:6]
        table.add_column(heading, justify="right" if is_figure else "left", overflow="fold")
    for one in results:
        table.add_row(*(Text(cell) for cell in _cells(one)))
    return table


def _cells(one: DeviceResult) -> tuple[str, ...]:
    quality = NOTHING
    if one.metric is not None and one.quality is not None:
        quality = f"{format_value(one.metric, one.quality)} {metric_name(one.metric)}"
    return (
        one.device,
        one.variant,
        f"{one.num_runs}, {one.num_failed} FAILED" if one.num_failed else str(one.num_runs),
        NOTHING if one.peak_bytes is None else format_bytes(one.peak_bytes),
        NOTHING if one.step_seconds is None else format_seconds(one.step_seconds),
        quality,
        _losses(one.loss_difference),
    )


def _losses(difference: float | None) -> str:
    if difference is None:
        return NOTHING
    return "same bits" if difference == 0 else f"up to {difference:.2g} off the first device"
