"""Labels beside points, placed so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_CHARACTER = 7.4  # pixels: mean width of a bold character at 12 px in wide sans-serif fonts
_HEIGHT = 16.0
_GAP = 11.0  # from the centre of a point to its label


@dataclass(frozen=True, slots=True)
class Point:
    """A point in pixels with its label; y grows downwards."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a label starts (`left`), is centred (`center`) or ends (`right`); y is its middle."""

    x: float
    y: float
    align: str


def place_labels(
    points: Sequence[Point], width: float, height: float, rules: Sequence[float] = ()
) -> list[Placed]:
    """Place each label right, left, above or below its point, the first place that is free.

    Greedy, in the order of the points; where no place is free, the label goes to the right. Its
    box may touch no other label and no point, and stays inside the picture. Vertical lines at the
    places `rules` are crossed only where there is no other way.
    """
    taken = [(p.x - 7, p.y - 7, p.x + 7, p.y + 7) for p in points]
    placed = []
    for point in points:
        options = _options(point)
        free = [
            (place, box)
            for place, box in options
            if _is_inside(box, width, height) and not any(_overlap(box, other) for other in taken)
        ]
        clear = [one for one in free if not any(one[1][0] <= x <= one[1][2] for x in rules)]
        place, box = (clear or free or options)[0]
        taken.append(box)
        placed.append(place)
    return placed


_Box = tuple[float, float, float, float]


def _options(point: Point) -> list[tuple[Placed, _Box]]:
    size = _CHARACTER * len(point.label)
    found = []
    for rise in (0.0, -_HEIGHT, _HEIGHT, -2 * _HEIGHT, 2 * _HEIGHT):
        y = point.y + rise
        for align, x, left in (
            ("left", point.x + _GAP, point.x + _GAP),
            ("right", point.x - _GAP, point.x - _GAP - size),
            ("center", point.x, point.x - size / 2),
        ):
            box = (left, y - _HEIGHT / 2, left + size, y + _HEIGHT / 2)
            found.append((Placed(x, y, align), box))
    return found


def _is_inside(box: _Box, width: float, height: float) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


def _overlap(first: _Box, second: _Box) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )
