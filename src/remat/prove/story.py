"""The story of one step: which block works when, and what each block holds meanwhile."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from remat.prove.records import Act, StepStory, StoryMoment
from remat.trace.memory import breakdown_at, memory_by_kind
from remat.trace.records import (
    ACTIVATIONS,
    BACKWARD,
    BASE_KINDS,
    FORWARD,
    OPTIMIZER,
    TEMPORARIES,
    Handle,
    Op,
    OpSignature,
    StepTrace,
)

MOST_BLOCKS = 24  # more tiles than that cannot be told apart on a page
MOST_MOMENTS = 200
LOSS = "loss"


@dataclass(frozen=True, slots=True)
class _Mark:
    """One op: when, what it is part of, and whose."""

    tick: int
    act: Act
    block: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Ticks from `start` up to `stop`, not included, in which one block does one thing."""

    act: Act
    block: int
    start: int
    stop: int


def tell_story(
    trace: StepTrace, blocks: Sequence[str], workspace: Mapping[OpSignature, int] | None = None
) -> StepStory:
    """Tell the story of a step traced with `drop_saved=False`, by these module calls.

    Bytes are exact. Forward ops belong to the block that they run in; ops of backward, which run
    in no module, to the block that saved what they have just unpacked. What a region saves cannot
    be seen, so that inside of regions the borders between blocks are good to a few ops.
    """
    groups = _groups(blocks)
    places = {name: place for place, group in enumerate(groups) for name in group}
    stretches = _stretches(trace, places, loss=len(groups))
    curves = memory_by_kind(trace, workspace)
    total = np.sum(list(curves.values()), axis=0)
    held = _held(trace, stretches, num_blocks=len(groups) + 1)
    moments = []
    for at, stretch in enumerate(stretches):
        highest = stretch.start + int(np.argmax(total[stretch.start : stretch.stop]))
        moments.append(
            StoryMoment(
                act=stretch.act,
                block=stretch.block,
                bytes_by_kind=breakdown_at(curves, highest),
                held_bytes=tuple(int(size) for size in held[:, at]),
            )
        )
    labels = tuple(_label(group) for group in groups)
    return StepStory(blocks=(*labels, LOSS), moments=tuple(moments))


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Put neighbours together until no more than `MOST_BLOCKS` groups are left."""
    width = -(-len(names) // MOST_BLOCKS)
    return [list(names[i : i + width]) for i in range(0, len(names), width)]


def _label(names: Sequence[str]) -> str:
    """Name a group by its first and last block, `layers.2 … 4` where they are of one list."""
    first, last = names[0] or "model", names[-1]
    if len(names) == 1:
        return first
    of_one_list = first.rpartition(".")[0] == last.rpartition(".")[0]
    return f"{first} … {last.rpartition('.')[2] if of_one_list else last}"


def _stretches(trace: StepTrace, places: Mapping[str, int], loss: int) -> list[_Stretch]:
    """Cut the clock where another block or another act begins."""
    reader = _Reader(trace, places, loss)
    marks: list[_Mark] = []
    waiting: list[int] = []  # ticks of ops that begin something of which the next op tells more
    for op in trace.ops:
        act = reader.act_of(op)
        if op.is_view and act is not Act.UPDATE:
            continue
        before = marks[-1] if marks else None
        block = reader.block_of(op, act, before)
        if block is None and before is not None and before.act is act:
            block = before.block
        if block is None:
            waiting.append(op.tick)
            continue
        marks += [_Mark(tick, act, block) for tick in (*waiting, op.tick)]
        waiting = []
        reader.note(op, act, block)
    stretches = _joined(marks, trace.num_ticks)
    return stretches if len(stretches) <= MOST_MOMENTS else _folded(stretches)


class _Reader:
    """Says what each op of a trace is part of, and whose it is, from the first op to the last."""

    def __init__(self, trace: StepTrace, places: Mapping[str, int], loss: int) -> None:
        self._trace, self._places, self._loss = trace, places, loss
        # The first op under gradients in backward makes the gradient of the loss itself.
        self._replayed = set(trace.replayed_ticks[1:])
        self._last_call = max((c.end for c in trace.calls if c.phase == FORWARD), default=-1)
        self._makers: dict[int, int] = {}  # storage -> block
        self._users: dict[int, set[int]] = {}  # parameter, buffer or batch -> blocks
        self._forward: list[tuple[int, int]] = []  # tick, block
        self._unpacked: list[tuple[int, int]] | None = None  # tick, block; the last one first

    def act_of(self, op: Op) -> Act:
        """What the op is part of."""
        if op.phase == OPTIMIZER:
            return Act.UPDATE
        if op.phase == BACKWARD:
            return Act.AGAIN if op.tick in self._replayed else Act.BACKWARD
        return Act.FORWARD

    def block_of(self, op: Op, act: Act, before: _Mark | None) -> int | None:
        """Whose op it is; `None` where only its neighbours can tell."""
        if act is Act.UPDATE:
            return 0  # it works on all of them
        if act is Act.FORWARD:
            return self._loss if op.tick > self._last_call else self._block_of_call(op.call)
        unpacked = self._just_unpacked(op.tick)
        if act is Act.BACKWARD and unpacked is not None:
            return unpacked
        found = self._block_of_call(op.call)
        if found is None and act is Act.AGAIN:
            found = unpacked  # a single op, which runs again where its result is read
        if found is not None:
            return found
        using = {block for s in op.inputs for block in self._users.get(s, ())}
        past = before.block if before is not None else self._loss
        if using:
            return max({block for block in using if block <= past} or using)
        return max((self._makers[s] for s in op.inputs if s in self._makers), default=None)

    def note(self, op: Op, act: Act, block: int) -> None:
        """Remember whose op it was."""
        if act in (Act.FORWARD, Act.AGAIN):
            self._makers |= dict.fromkeys(op.fresh, block)
        if act is Act.FORWARD:
            self._forward.append((op.tick, block))
            for storage in op.inputs:
                if self._trace.storages[storage].kind in BASE_KINDS:
                    self._users.setdefault(storage, set()).add(block)

    def _block_of_call(self, call: int) -> int | None:
        return _place(self._trace.calls[call].module, self._places) if call >= 0 else None

    def _just_unpacked(self, tick: int) -> int | None:
        """Return who saved what was unpacked since the last op, if anything was."""
        if self._unpacked is None:
            saved = [(h.unpack, self._saver(h)) for h in self._trace.handles if h.unpack >= 0]
            self._unpacked = sorted(saved, reverse=True)
        found = None
        while self._unpacked and self._unpacked[-1][0] <= tick:
            found = self._unpacked.pop()[1]
        return found

    def _saver(self, handle: Handle) -> int:
        if handle.pack > self._last_call:
            return self._loss
        found = self._block_of_call(handle.call)
        if found is not None:
            return found
        at = bisect_left(self._forward, (handle.pack, 0))
        return self._forward[max(at - 1, 0)][1] if self._forward else 0


def _place(module: str, places: Mapping[str, int]) -> int | None:
    """Find the block that a module lies in, from its own name upwards."""
    while module:
        if module in places:
            return places[module]
        module = module.rpartition(".")[0]
    return places.get("")


def _joined(marks: Sequence[_Mark], num_ticks: int) -> list[_Stretch]:
    """Make one stretch of neighbours that do the same; they cover the clock without a gap."""
    first = [next(group) for _, group in groupby(marks, key=lambda mark: (mark.act, mark.block))]
    starts = [0, *(mark.tick for mark in first[1:])]
    stops = [*starts[1:], num_ticks]
    return [
        _Stretch(mark.act, mark.block, start, stop)
        for mark, start, stop in zip(first, starts, stops, strict=True)
    ]


def _folded(stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """Make one stretch of all that a block does in backward before the next block."""
    found = []
    for (is_back, _), group in groupby(
        stretches, key=lambda s: (s.act in (Act.AGAIN, Act.BACKWARD), s.block)
    ):
        parts = list(group)
        if is_back:
            act = Act.AGAIN if any(part.act is Act.AGAIN for part in parts) else Act.BACKWARD
            parts = [replace(parts[0], act=act, stop=parts[-1].stop)]
        found += parts
    return found


def _held(trace: StepTrace, stretches: Sequence[_Stretch], num_blocks: int) -> NDArray[np.int64]:
    """Bytes that each block made in forward, or again, and that live at the end of each stretch.

    Returns (num_blocks, num_stretches).
    """
    stops = np.array([stretch.stop for stretch in stretches])
    changes = np.zeros((num_blocks, len(stretches) + 1), dtype=np.int64)
    for storage in trace.storages:
        if storage.kind not in (ACTIVATIONS, TEMPORARIES):
            continue
        home = stretches[min(int(np.searchsorted(stops, storage.birth, "right")), len(stops) - 1)]
        if home.act not in (Act.FORWARD, Act.AGAIN):
            continue
        for start, end in storage.intervals:
            # alive at the last tick of a stretch: born before its stop, and not dead before that
            first = int(np.searchsorted(stops, start, "right"))
            after = int(np.searchsorted(stops, end + 1, "right"))
            changes[home.block, min(first, len(stops))] += storage.size_bytes
            changes[home.block, min(after, len(stops))] -= storage.size_bytes
    held: NDArray[np.int64] = np.cumsum(changes, axis=1)[:, :-1]
    return held
