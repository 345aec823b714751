"""Pictures of a few hundred bytes, for tables of many runs: a loss curve, and a front."""

from __future__ import annotations

import math
from collections.abc import Sequence

from remat.report.palette import variant_roles
from remat.runs.reading import reference_of
from remat.runs.records import Run

WIDTH, HEIGHT = 100, 32
_MOST_POINTS = 60
_EDGE = 4.0  # pixels kept free around the marks
# Both axes of a front are shares of the step without a plan, the same for all runs of a page.
_MEMORY = (0.0, 1.1)
_TIME = (0.9, 1.9)


def loss_path(losses: Sequence[float]) -> str:
    """Draw a loss curve as the path of an SVG of 100 by 32; empty where there is no curve."""
    width = max(1, -(-len(losses) // _MOST_POINTS))
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    means = [sum(part) / len(part) for part in parts]
    points = [(i, value) for i, value in enumerate(means) if math.isfinite(value)]
    if len(points) < 2:
        return ""
    low, high = min(value for _, value in points), max(value for _, value in points)
    height = (HEIGHT - 2 * _EDGE) / ((high - low) or 1.0)
    step = WIDTH / (len(means) - 1)
    drawn = [f"{i * step:.1f} {HEIGHT - _EDGE - (value - low) * height:.1f}" for i, value in points]
    return "M" + "L".join(drawn)


def front_points(run: Run) -> tuple[tuple[float, float, str], ...]:
    """Place each variant by memory and time, as shares of no plan, in an SVG of 100 by 32.

    Gives x, y and colour role; what lies outside is drawn at the edge.
    """
    reference = reference_of(run.variants)
    if reference is None or not reference.measured_peak_bytes or reference.step_times is None:
        return ()
    roles = variant_roles(run.variants)
    found = []
    for variant in run.variants:
        if variant.measured_peak_bytes and variant.step_times is not None:
            memory = variant.measured_peak_bytes / reference.measured_peak_bytes
            seconds = variant.step_times.median_seconds / reference.step_times.median_seconds
            x = _EDGE + (WIDTH - 2 * _EDGE) * _share(memory, _MEMORY)
            y = HEIGHT - _EDGE - (HEIGHT - 2 * _EDGE) * _share(seconds, _TIME)
            found.append((round(x, 1), round(y, 1), roles[variant.label]))
    return tuple(found)


def _share(value: float, between: tuple[float, float]) -> float:
    low, high = between
    return max(0.0, min(1.0, (value - low) / (high - low)))
