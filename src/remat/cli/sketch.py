"""The Pareto front as a sketch of characters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from remat.planner.records import Plan
from remat.units import format_bytes

_HEIGHT = 9
_MARGIN = 8  # for the labels of the upright axis
_MOST_WIDTH = 72


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One plan: bytes at the peak, and the share of the forward pass that is computed twice."""

    peak_bytes: int
    fraction: float


def front_view(front: Sequence[Plan], chosen: Plan | None, width: int) -> RenderableType:
    """Sketch plans by peak and recomputation; `chosen` is marked."""
    points = [
        Point(peak_bytes=plan.predicted_peak_bytes, fraction=plan.recompute_fraction)
        for plan in front
    ]
    mark = chosen and Point(
        peak_bytes=chosen.predicted_peak_bytes, fraction=chosen.recompute_fraction
    )
    lines = draw_front(points, mark or None, width)
    legend = Text.assemble(("○", "cyan"), " least recomputation for a peak", style="dim")
    if mark:
        legend.append("   ").append("●", style="bold green").append(" this plan")
    title = Text("Pareto front: computed twice (share of the forward pass) against peak memory")
    title.stylize("bold", 0, len("Pareto front"))
    return Group(title, *(_colored(line) for line in lines), Text(" " * _MARGIN) + legend, Text())


def draw_front(points: Sequence[Point], chosen: Point | None, width: int) -> list[str]:
    """Draw the points as `○`, joined by dots, and the chosen one as `●`; axes have two labels."""
    everything = [*points, *([chosen] if chosen else [])]
    columns = max(min(width, _MOST_WIDTH) - _MARGIN - 2, 20)
    least = min(point.peak_bytes for point in everything)
    most = max(point.peak_bytes for point in everything)
    top = max(point.fraction for point in everything)

    def place(point: Point) -> tuple[int, int]:
        across = (point.peak_bytes - least) / max(most - least, 1)
        up = point.fraction / top if top > 0 else 0.0
        return round(across * (columns - 1)), round((1 - up) * (_HEIGHT - 1))

    grid = [[" "] * columns for _ in range(_HEIGHT)]
    in_order = sorted(points, key=lambda point: point.peak_bytes)
    for one, other in itertools.pairwise(in_order):
        (x0, y0), (x1, y1) = place(one), place(other)
        for x in range(x0, x1):
            grid[round(y0 + (y1 - y0) * (x - x0) / (x1 - x0))][x] = "·"
    for point in points:
        x, y = place(point)
        grid[y][x] = "○"
    if chosen:
        x, y = place(chosen)
        grid[y][x] = "●"
    labels = {0: f"{top:.1%}", _HEIGHT - 1: "0%"}
    drawn = [
        f"{labels.get(row, ''):>{_MARGIN - 2}} ┤{''.join(cells)}".rstrip()
        for row, cells in enumerate(grid)
    ]
    left, right = format_bytes(least), format_bytes(most)
    drawn.append(" " * (_MARGIN - 1) + "└" + "─" * columns)
    drawn.append(" " * _MARGIN + left + right.rjust(columns - len(left)))
    return drawn


def _colored(line: str) -> Text:
    text = Text(line, no_wrap=True)
    text.highlight_regex("○", "cyan")
    text.highlight_regex("·", "dim cyan")
    text.highlight_regex("●", "bold green")
    return text
