"""The user's own step as a story: what each moment shows and says, ready to be drawn and played."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from remat.prove.records import Act, StepStory, StoryMoment
from remat.report.palette import variant_roles
from remat.runs.reading import best_planned, reference_of
from remat.runs.records import Run, Variant
from remat.units import format_bytes

# Any: what is written as JSON for the script.

# What a block's tile shows; the script turns each letter into the tile's state.
WAITS, FORWARD, KEEPS, PART, DROPPED, AGAIN, BACKWARD, DONE = "wfkpdabx"
# Of what a block made in forward, so much must be held for it to be called kept, or not dropped.
_KEPT, _DROPPED = 0.9, 0.1
# Below this a block has nothing worth telling of.
_NOTED_BYTES = 1024
_SPARE = 1.12  # room above the highest line of the curve for its name
_BAR = 34  # height of the mark of work in a row of 100
_ALWAYS = ("parameters", "buffers", "optimizer", "batch", "gradients")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One block over the whole step: how much it holds, and when it works, as SVG paths."""

    name: str
    area: str
    forward: str
    again: str
    backward: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A level of the curve with its name; `share` is its height from 0 to 1."""

    share: float
    text: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tale:
    """The story of one variant: rows and curve to draw, and for each moment what it says."""

    label: str
    role: str
    caption: str
    rows: tuple[Row, ...]
    always: str
    total: str
    lines: tuple[Line, ...]
    texts: tuple[str, ...]
    states: tuple[str, ...]
    fills: tuple[tuple[int, ...], ...]
    is_default: bool

    @property
    def num_moments(self) -> int:
        """Moments of the step."""
        return len(self.texts)

    def for_script(self) -> dict[str, Any]:
        """What the script needs beside the drawn page."""
        return {"texts": self.texts, "states": self.states, "fills": self.fills}


def tales(run: Run) -> tuple[Tale, ...]:
    """Tell the story of every variant that has one; the smallest plan is shown first."""
    told = [v for v in run.variants if v.story is not None and v.story.moments]
    if not told:
        return ()
    best, reference = best_planned(run.variants), reference_of(run.variants)
    chosen = best if best in told else told[-1]
    stories = [v.story for v in told if v.story is not None]
    scale = _Scale(
        full=_made_in_forward(stories),
        most_held=max([1, *(size for s in stories for m in s.moments for size in m.held_bytes)]),
        top=_SPARE * max([_peak(s) for s in stories] + [v.budget_bytes or 0 for v in told]),
        reference_peak=_peak(reference.story) if reference and reference.story else None,
    )
    roles = variant_roles(run.variants)
    return tuple(
        _tale(v, v.story, scale, role=roles[v.label], is_default=v is chosen)
        for v in told
        if v.story is not None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """What all stories of a run are drawn and told against."""

    full: dict[str, int]
    most_held: int
    top: float
    reference_peak: int | None


def _tale(
    variant: Variant, story: StepStory, scale: _Scale, *, role: str, is_default: bool
) -> Tale:
    peak = _peak(story)
    totals = [sum(m.bytes_by_kind.values()) for m in story.moments]
    base = [sum(m.bytes_by_kind.get(k, 0) for k in _ALWAYS) for m in story.moments]
    return Tale(
        label=variant.label,
        role=role,
        caption=_caption(story, peak),
        rows=tuple(_row(story, block, scale.most_held) for block in range(len(story.blocks))),
        always=_area([size / scale.top for size in base]),
        total=_area([size / scale.top for size in totals]),
        lines=tuple(_lines(variant, peak, scale)),
        texts=tuple(_texts(story, scale.full, peak)),
        states=tuple(_states(story, scale.full)),
        fills=tuple(
            tuple(round(100 * size / scale.most_held) for size in m.held_bytes)
            for m in story.moments
        ),
        is_default=is_default,
    )


def _lines(variant: Variant, peak: int, scale: _Scale) -> Iterator[Line]:
    yield Line(share=peak / scale.top, text=f"peak {format_bytes(peak)}", kind="peak")
    if variant.budget_bytes:
        text = f"budget {format_bytes(variant.budget_bytes)}"
        yield Line(share=variant.budget_bytes / scale.top, text=text, kind="budget")
    if scale.reference_peak is not None and scale.reference_peak != peak:
        text = f"without a plan {format_bytes(scale.reference_peak)}"
        yield Line(share=scale.reference_peak / scale.top, text=text, kind="reference")


def _peak(story: StepStory) -> int:
    return max(sum(moment.bytes_by_kind.values()) for moment in story.moments)


def _made_in_forward(stories: Sequence[StepStory]) -> dict[str, int]:
    """What each block holds right after its forward where it keeps the most: without a plan."""
    full: dict[str, int] = {}
    for story in stories:
        for moment in story.moments:
            if moment.act is Act.FORWARD:
                name = story.blocks[moment.block]
                full[name] = max(full.get(name, 0), moment.held_bytes[moment.block])
    return full


def _caption(story: StepStory, peak: int) -> str:
    again = {m.block for m in story.moments if m.act is Act.AGAIN}
    at = next(m for m in story.moments if sum(m.bytes_by_kind.values()) == peak)
    doing = {
        Act.FORWARD: "forward through",
        Act.AGAIN: "forward again through",
        Act.BACKWARD: "backward through",
        Act.UPDATE: "the update after",
    }[at.act]
    blocks = "1 block runs" if len(again) == 1 else f"{len(again) or 'no'} blocks run"
    return (
        f"{blocks[0].upper()}{blocks[1:]} forward again; the peak of {format_bytes(peak)} falls "
        f"into {doing} {story.blocks[at.block]}."
    )


def _row(story: StepStory, block: int, most_held: int) -> Row:
    held = [moment.held_bytes[block] / most_held for moment in story.moments]
    return Row(
        name=story.blocks[block],
        area=_area(held) if any(held) else "",
        forward=_bars(story, block, Act.FORWARD),
        again=_bars(story, block, Act.AGAIN),
        backward=_bars(story, block, Act.BACKWARD),
    )


def _bars(story: StepStory, block: int, act: Act) -> str:
    """Draw a bar in every moment in which the block does this."""
    return "".join(
        f"M{at} 0h1v{_BAR}h-1z"
        for at, moment in enumerate(story.moments)
        if moment.act is act and moment.block == block
    )


def _area(shares: Sequence[float]) -> str:
    """Draw a stepped area over moments of width 1 and a height of 100, closed at the bottom."""
    path = ["M0 100"]
    before = None
    for at, share in enumerate(shares):
        height = f"{100 * (1 - share):.1f}".removesuffix(".0")
        if height != before:
            path.append(f"H{at}V{height}")
            before = height
    return "".join([*path, f"H{len(shares)}V100z"])


def _states(story: StepStory, full: dict[str, int]) -> list[str]:
    """Write, for each moment, one letter per block."""
    last_work = {m.block: at for at, m in enumerate(story.moments) if m.act is Act.BACKWARD}
    has_run: set[int] = set()
    written = []
    for at, moment in enumerate(story.moments):
        if moment.act is Act.FORWARD:
            has_run.add(moment.block)
        letters = [
            _state(story, full, moment, block, is_done=at > last_work.get(block, at), run=has_run)
            for block in range(len(story.blocks))
        ]
        written.append("".join(letters))
    return written


def _state(
    story: StepStory,
    full: dict[str, int],
    moment: StoryMoment,
    block: int,
    *,
    is_done: bool,
    run: set[int],
) -> str:
    if moment.act is Act.UPDATE:
        return DONE
    if moment.block == block:
        return {Act.FORWARD: FORWARD, Act.AGAIN: AGAIN, Act.BACKWARD: BACKWARD}[moment.act]
    if is_done:
        return DONE
    if block not in run:
        return WAITS
    whole, held = full.get(story.blocks[block], 0), moment.held_bytes[block]
    if whole < _NOTED_BYTES or held >= _KEPT * whole:
        return KEEPS
    return DROPPED if held <= _DROPPED * whole else PART


def _texts(story: StepStory, full: dict[str, int], peak: int) -> list[str]:
    texts = []
    before: tuple[int, ...] = (0,) * len(story.blocks)
    for moment in story.moments:
        total = sum(moment.bytes_by_kind.values())
        text = f"{_told(story, full, moment, before)} Memory: {format_bytes(total)}"
        texts.append(f"{text}, the peak of the step." if total == peak else f"{text}.")
        before = moment.held_bytes
    return texts


def _told(
    story: StepStory, full: dict[str, int], moment: StoryMoment, before: Sequence[int]
) -> str:
    name = story.blocks[moment.block]
    held, freed = moment.held_bytes[moment.block], sum(before) - sum(moment.held_bytes)
    if moment.act is Act.UPDATE:
        return "Update: the optimizer changes the weights, and the step is done."
    if moment.act is Act.FORWARD:
        dropped = full.get(name, 0) - held
        start = f"Forward through {name}."
        if dropped > _NOTED_BYTES:
            return (
                f"{start} It drops {format_bytes(dropped)} of what it made and keeps "
                f"{format_bytes(held)}."
            )
        if held < _NOTED_BYTES:
            return start
        return f"{start} It keeps {format_bytes(held)} for backward."
    if moment.act is Act.AGAIN:
        return (
            f"Backward needs what {name} dropped, so {name} runs forward again and holds "
            f"{format_bytes(held)}."
        )
    start = f"Backward through {name}: its gradients are made"
    return f"{start}, and {format_bytes(freed)} are freed." if freed > 0 else f"{start}."
