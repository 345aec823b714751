"""The page of a planned step's memory: bytes by kind over two steps, and the largest blocks."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remat.files import write_atomically
from remat.planner.records import Plan
from remat.report import palette
from remat.report.drawing import (
    Chart,
    fixed_scale,
    inline_data,
    literal,
    require_pictures,
    svg_text,
)
from remat.report.pages import page_environment
from remat.units import GIB, MIB, format_bytes

# Any: a snapshot is nested dicts and lists, of PyTorch's own form.

_WIDTHS = {"wide": 940, "narrow": 340}  # of pictures, on a desktop and on a phone
_LETTER_WIDTH = 6.2
_MOST_MOMENTS = 400
_MOST_BLOCKS = 24
_SEGMENTS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLife:
    """One block of memory: what made it, where, and from when to when it is there."""

    size_bytes: int
    kind: str
    op: str
    module: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStory:
    """What a snapshot tells: bytes by kind and bytes reserved at each moment, and every block."""

    moments: tuple[tuple[int, Mapping[str, int], int], ...]  # tick, bytes by kind, reserved
    blocks: tuple[BlockLife, ...]
    phases: tuple[tuple[str, int], ...]
    peak_tick: int
    peak_bytes: int

    def at_peak(self) -> list[BlockLife]:
        """Return the largest blocks that are there at the peak, by size."""
        there = [b for b in self.blocks if b.start <= self.peak_tick <= b.end]
        return sorted(there, key=lambda block: -block.size_bytes)[:_MOST_BLOCKS]


@dataclass(slots=True)
class _Teller:
    """Follows the events of a snapshot."""

    alive: dict[int, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    by_kind: Counter[str] = field(default_factory=Counter)
    reserved: int = 0
    moments: list[tuple[int, dict[str, int], int]] = field(default_factory=list)
    blocks: list[BlockLife] = field(default_factory=list)

    def tell(self, event: dict[str, Any]) -> None:
        action, tick, address = event["action"], event["time_us"], event["addr"]
        if action == "alloc":
            self.alive[address] = (tick, event)
            self.by_kind[event["category"]] += event["size"]
        elif action == "free_completed":
            self.end(address, tick)
        else:
            self.reserved += _SEGMENTS.get(action, 0) * event["size"]
        self.moments.append((tick, dict(self.by_kind), self.reserved))

    def end(self, address: int, tick: int) -> None:
        start, event = self.alive.pop(address)
        self.by_kind[event["category"]] -= event["size"]
        made = event["frames"][0] if event["frames"] else {"name": "a library", "filename": ""}
        self.blocks.append(
            BlockLife(
                size_bytes=event["size"],
                kind=event["category"],
                op=made["name"],
                module=made["filename"],
                start=start,
                end=tick,
            )
        )


def memory_story(snapshot: Mapping[str, Any]) -> MemoryStory:
    """Read a snapshot of `remat.prove.snapshot`: what is there when, by kind and block by block."""
    teller = _Teller()
    events = snapshot["device_traces"][0]
    for event in events:
        teller.tell(event)
    last = events[-1]["time_us"]
    moments = tuple(teller.moments)
    for address in list(teller.alive):
        teller.end(address, last)
    peak = max(moments, key=lambda moment: sum(moment[1].values()))
    return MemoryStory(
        moments=moments,
        blocks=tuple(teller.blocks),
        phases=tuple((a["name"], a["time_us"]) for a in snapshot["external_annotations"]),
        peak_tick=peak[0],
        peak_bytes=sum(peak[1].values()),
    )


def write_memory(
    name: str, plan: Plan, snapshot: Mapping[str, Any], path: str | os.PathLike[str]
) -> Path:
    """Write the page; an interrupted write leaves the old page or none.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    return write_atomically(path, render_memory(name, plan, snapshot))


def render_memory(name: str, plan: Plan, snapshot: Mapping[str, Any]) -> str:
    """Make the page of a plan's step from its memory snapshot.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    require_pictures()
    story = memory_story(snapshot)
    largest = story.at_peak()
    counts_reserved = plan.predicted_reserved_bytes is not None
    kinds = [kind for kind in palette.KINDS if any(m[1].get(kind) for m in story.moments)]
    return (
        page_environment()
        .get_template("memory.html.j2")
        .render(
            name=name,
            plan=plan,
            story=story,
            kinds=kinds,
            counts_reserved=counts_reserved,
            over_time={
                label: _over_time(story, width, counts_reserved=counts_reserved)
                for label, width in _WIDTHS.items()
            },
            lives={label: _lives(story, largest, width) for label, width in _WIDTHS.items()},
            largest=largest,
            light=palette.css_variables(palette.LIGHT),
            dark=palette.css_variables(palette.DARK),
        )
    )


def _over_time(story: MemoryStory, picture_width: int, *, counts_reserved: bool) -> str:
    """Draw bytes by kind as areas, and what is reserved as a line above them."""
    import altair as alt

    shown = list(_highest(story))
    unit, label = _unit(max(max(sum(m[1].values()), m[2]) for m in shown))
    rows = [
        {
            "tick": tick,
            "order": order,
            "size": by_kind.get(kind, 0) / unit,
            "colour": palette.css_colour(f"kind-{kind}"),
        }
        for tick, by_kind, _ in shown
        for order, kind in enumerate(palette.KINDS)
    ]
    x = _time_axis(story)
    y = alt.Y("size:Q", title=label, stack="zero")
    area = (
        alt.Chart(inline_data(rows))
        .mark_area(interpolate="step-after", line=False)
        .encode(x=x, y=y, color=literal(alt.Color, "colour"), order="order:Q", detail="order:N")
    )
    width = picture_width - 90
    layers = [area, *_phase_marks(story, width)]
    if counts_reserved:
        reserved = [{"tick": tick, "size": held / unit} for tick, _, held in shown]
        layers.append(
            alt.Chart(inline_data(reserved))
            .mark_line(interpolate="step-after", color="currentColor", strokeWidth=1.6)
            .encode(x=x, y=alt.Y("size:Q", title=label))
        )
    chart = alt.layer(*layers).properties(width=width, height=300)
    return svg_text(chart, "memory", picture_width)


def _lives(story: MemoryStory, largest: list[BlockLife], picture_width: int) -> str:
    """Draw when each of the largest blocks is there, and the peak as a line."""
    import altair as alt

    rows = [
        {
            "block": f"{number}  {format_bytes(block.size_bytes)}",
            "tick": block.start,
            "end": block.end,
            "colour": palette.css_colour(f"kind-{block.kind}"),
        }
        for number, block in enumerate(largest, start=1)
    ]
    x = _time_axis(story)
    bars = (
        alt.Chart(inline_data(rows))
        .mark_bar(height={"band": 0.72})
        .encode(
            x=x,
            x2="end:Q",
            y=alt.Y("block:N", sort=None, title=None),
            color=literal(alt.Color, "colour"),
        )
    )
    peak = (
        alt.Chart(inline_data([{"tick": story.peak_tick}]))
        .mark_rule(color=palette.css_colour("budget"), strokeWidth=1.8, strokeDash=[6, 3])
        .encode(x=x)
    )
    width = picture_width - 130
    chart = alt.layer(bars, peak).properties(width=width, height=18 * len(rows))
    return svg_text(chart, "blocks", picture_width)


def _highest(story: MemoryStory) -> Iterator[tuple[int, Mapping[str, int], int]]:
    """Yield the highest moment of each of a few hundred spans of time."""
    span = max(1, -(-story.moments[-1][0] // _MOST_MOMENTS))
    for _, group in itertools.groupby(story.moments, key=lambda moment: moment[0] // span):
        yield max(group, key=lambda moment: (sum(moment[1].values()), moment[2]))


def _time_axis(story: MemoryStory) -> Any:
    import altair as alt

    scale = fixed_scale((0, story.moments[-1][0] or 1))
    return alt.X("tick:Q", title=None, axis=None, scale=scale)


def _phase_marks(story: MemoryStory, width: int) -> list[Chart]:
    """Name each phase where it begins, if its name has room, on one line above the picture."""
    import altair as alt

    last = story.moments[-1][0] or 1
    ends = [tick for _, tick in story.phases[1:]] + [last]
    rows = [
        {
            "tick": tick,
            "phase": phase if (end - tick) / last * width > _LETTER_WIDTH * len(phase) else "",
        }
        for (phase, tick), end in zip(story.phases, ends, strict=True)
    ]
    base = alt.Chart(inline_data(rows)).encode(x=_time_axis(story))
    return [
        base.mark_rule(color="currentColor", opacity=0.35, strokeDash=[1, 3]),
        base.mark_text(align="left", baseline="bottom", dx=3, dy=-3, fontSize=11,
                       color="currentColor", opacity=0.8)
        .encode(y=alt.value(0), text="phase:N"),
    ]  # fmt: skip


def _unit(most_bytes: int) -> tuple[int, str]:
    return (GIB, "GiB") if most_bytes >= 2 * GIB else (MIB, "MiB")
