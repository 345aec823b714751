"""Recursion: the best nested recomputation of a chain of calls, by dynamic programming.

The recurrences are those of Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, "Optimal
checkpointing for heterogeneous chains" (arXiv:1911.13214), over persistent schedules. With the
input of stage s at hand and M bytes for what is held, backward through stages s..t costs

    R(s, t, M) = min( R(s+1, t, M - saved(s))                                  keep stage s
                      min over i in (s, t]: F(s, i) + R(i, t, M - input(i)) + R(s, i-1, M) )

where F(s, i) runs stages s..i-1 again, up to the last tensor that is saved: these become one
region, and what R(s, i-1, M) decides inside it, regions nested in it. Memory is counted in a few
hundred slots, to the nearest; the timeline then tells the exact peak of each plan that is found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remat.planner.chains import find_chains, tilings
from remat.planner.options import Option, OptionBuilder
from remat.planner.spans import Facts, Span
from remat.planner.timeline import Timeline
from remat.trace.records import BASE_KINDS

_NUM_SLOTS = 400
# Longer chains are planned in groups of stages, unless all their stages are alike.
_MOST_STAGES = 72
_SHORTEST_CHAIN = 4
_ZOOM = 8
_MOST_FORESTS = 40
_ALIKE = 1e-6

Forest = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Stages:
    """What the stages of a chain cost and take; a stage is one call or a group of them.

    `seconds` are those of a whole stage, `last_seconds` up to the last tensor that it saves.
    `inputs` and `saved` are bytes, `needs` the least bytes in all, of the whole step, at which the
    stage's backward can run when nothing else of the chain is held; the last of the n + 1 `needs`
    is that of everything after the chain.
    """

    calls: tuple[tuple[int, ...], ...]
    seconds: NDArray[np.float64]
    last_seconds: NDArray[np.float64]
    inputs: NDArray[np.float64]
    saved: NDArray[np.float64]
    needs: NDArray[np.float64]

    @property
    def are_alike(self) -> bool:
        """Whether all stages cost and take the same."""
        return _longest_alike(self) == (0, len(self.calls))


def find_recursions(facts: Facts, bare: Timeline) -> tuple[tuple[tuple[Option, ...], ...], ...]:
    """Return, for every long chain of a step, its plans: nested ones, and runs of one length.

    Of each chain those that no other plan for it beats in both peak and cost; chains without any
    are left out. `bare` is the step's timeline, with any options.
    """
    refused: dict[Span, bool] = {}

    def may_run(forest: Forest) -> bool:
        for span in forest:
            if span not in refused:
                refused[span] = facts.refusal(span) is not None or not may_run(span.children)
            if refused[span]:
                return False
        return True

    found = []
    for chain in find_chains(facts.trace):
        first, stop = facts.handles(Span(chain))
        if len(chain) >= _SHORTEST_CHAIN and stop > first:
            forests = [tuple(Span(run) for run in runs) for runs in tilings(chain)]
            forests += find_forests(bare, facts, chain)
            found.append(tuple(_unbeaten(facts, bare, [f for f in forests if may_run(f)])))
    return tuple(filter(None, found))


def _unbeaten(facts: Facts, bare: Timeline, forests: list[Forest]) -> Iterator[tuple[Option, ...]]:
    """Yield the plans of one chain that are the cheapest at their exact peak."""
    builder = OptionBuilder(facts)
    roots = dict.fromkeys(span for forest in forests for span in forest)
    options = {span: made for span in roots if (made := builder.option(span)) is not None}
    position = {span: number for number, span in enumerate(options)}
    timeline = bare.with_options(tuple(options.values()))
    ranked = []
    for forest in forests:
        chosen = [span for span in forest if span in options]
        peak = timeline.curve([position[span] for span in chosen]).peak_bytes
        seconds = sum(options[s].seconds + options[s].overhead_seconds for s in chosen)
        ranked.append((peak, seconds, tuple(options[span] for span in chosen)))
    cheapest = float("inf")
    for _, seconds, chosen_options in sorted(ranked, key=lambda item: item[:2]):
        if seconds < cheapest:
            cheapest = seconds
            yield chosen_options


def find_forests(timeline: Timeline, facts: Facts, chain: tuple[int, ...]) -> Iterator[Forest]:
    """Yield plans for a chain, from the least memory to the most, as regions with regions inside.

    Complexity: O(n^3) in at most 72 stages, or O(n^2) where all stages are alike, times the number
    of slots.
    """
    stages = _stages(timeline, facts, tuple((call,) for call in chain))
    if len(chain) > _MOST_STAGES:
        first, stop = _longest_alike(stages)
        size = 1
        if stop - first < len(chain) / 2:
            first, stop, size = 0, len(chain), -(-len(chain) // _MOST_STAGES)
        groups = tuple(chain[i : min(i + size, stop)] for i in range(first, stop, size))
        stages = _stages(timeline, facts, groups)
    seen: set[Forest] = set()
    # A finer look at small memory, as far as slots of a stage's input can tell plans apart.
    most = float(stages.saved.sum() + stages.inputs.sum() + np.ptp(stages.needs))
    finest = float(np.median(stages.inputs)) * _NUM_SLOTS / 4
    while True:
        for forest in _Table(stages, most).forests():
            if forest and forest not in seen:
                seen.add(forest)
                yield forest
        if most <= finest or most < 1:
            return
        most /= _ZOOM


def _longest_alike(stages: Stages) -> tuple[int, int]:
    """Return the longest stretch of stages that cost and take the same, as first and stop.

    The first stage of a chain may be given what is held all the time, and then holds no input.
    """
    figures = np.stack([stages.seconds, stages.inputs, stages.saved])
    scale = np.maximum(np.abs(figures).max(axis=1, keepdims=True), 1e-30)
    differs = (np.abs(np.diff(figures, axis=1)) > _ALIKE * scale).any(axis=0)
    if len(differs) and not stages.inputs[0] and stages.inputs[1]:
        differs[0] = bool((np.abs(np.diff(figures, axis=1)) > _ALIKE * scale)[[0, 2], 0].any())
    bounds = [0, *(int(i) + 1 for i in np.flatnonzero(differs)), len(stages.calls)]
    return max(itertools.pairwise(bounds), key=lambda pair: pair[1] - pair[0])


def _stages(timeline: Timeline, facts: Facts, groups: tuple[tuple[int, ...], ...]) -> Stages:
    trace = facts.trace
    spans = [Span(calls) for calls in groups]
    inside = [facts.handles(span) for span in spans]
    first, stop = inside[0][0], inside[-1][1]
    held = np.zeros(trace.num_ticks + 2, dtype=np.int64)  # by the chain's saved tensors alone
    saved, backs = [], []
    own = np.zeros(trace.num_ticks + 2, dtype=np.int64)
    for span, (low, high) in zip(spans, inside, strict=True):
        until: dict[int, tuple[int, int]] = {}
        for handle in trace.handles[low:high]:
            before = until.get(handle.storage, (handle.pack, handle.end))
            until[handle.storage] = (before[0], max(before[1], handle.end))
        unpacked = [h.unpack for h in trace.handles[low:high] if h.unpack >= 0]
        backs.append((min(unpacked, default=-1), max((e for _, e in until.values()), default=-1)))
        mine = facts.storages(span)
        size = 0
        for storage, (pack, end) in until.items():
            record = trace.storages[storage]
            if record.kind in BASE_KINDS or _is_held(timeline, storage, first, stop):
                continue
            natural = max((d for b, d in record.intervals if b <= pack), default=pack)
            if end > natural:
                held[natural + 1] += record.size_bytes
                held[end + 1] -= record.size_bytes
            if mine[0] <= storage < mine[1]:
                size += record.size_bytes
                back = max(backs[-1][0], 0)
                own[back] += record.size_bytes
                own[end + 1] -= record.size_bytes
        saved.append(size)
    alive = timeline.curve(()).alive
    bare = alive - np.cumsum(held)[: len(alive)]
    with_own = bare + np.cumsum(own)[: len(alive)]
    needs = [
        float(with_own[low : high + 1].max()) if 0 <= low <= high else 0.0 for low, high in backs
    ]
    begin = facts.ticks(spans[-1])[1]
    turn = max(begin + 1, backs[-1][0])
    needs.append(float(bare[begin:turn].max()) if begin < turn else 0.0)
    return Stages(
        calls=groups,
        seconds=np.array([facts.seconds(*facts.ops(span)) for span in spans]),
        last_seconds=np.array([_seconds_to_last(facts, span) for span in spans]),
        inputs=np.array([_input_bytes(facts, span) for span in spans], dtype=np.float64),
        saved=np.array(saved, dtype=np.float64),
        needs=np.array(needs),
    )


def _seconds_to_last(facts: Facts, span: Span) -> float:
    first_op, _ = facts.ops(span)
    handles = facts.trace.handles[slice(*facts.handles(span))]
    return facts.seconds(first_op, max((h.ops_before for h in handles), default=first_op))


def _is_held(timeline: Timeline, storage: int, first: int, stop: int) -> bool:
    """Whether tensors saved outside the chain hold a storage as well."""
    return any(not first <= number < stop for number in timeline.handles_of.get(storage, ()))


def _input_bytes(facts: Facts, span: Span) -> int:
    """Return the bytes of the one argument that differs along a chain: the result before it."""
    call = facts.trace.calls[span.calls[0]]
    storages = facts.trace.storages
    return max(
        (
            storages[s].size_bytes
            for s in call.arguments.storages
            if storages[s].kind not in BASE_KINDS
        ),
        default=0,
    )


class _Table:
    """The recurrences in slots of memory, up to `most` bytes; see the module's docstring.

    R(s, t, M) is tabulated over M - needs(t), the memory beyond the least: for stages that are
    alike it then depends on the length t - s alone. After the last stage comes one more, which is
    everything after the chain and is never recomputed.
    """

    def __init__(self, stages: Stages, most: float) -> None:
        self.stages = stages
        self.num = len(stages.calls)
        unit = _slot_bytes(stages, most)
        self.slots = int(most / unit) + 2
        self.inputs = _in_slots(np.append(stages.inputs, 0.0), unit)
        self.kept = _in_slots(stages.saved + np.append(stages.inputs[1:], 0.0), unit)
        self.needs = _in_slots(stages.needs - stages.needs.min(), unit)
        self.until = np.concatenate([[0.0], np.cumsum(stages.seconds)])
        self.by_length = stages.are_alike and self.num > _MOST_STAGES
        rows = self.num if self.by_length else self.num * self.num
        self._costs = np.full((rows, self.slots), np.inf)
        self._steps = np.zeros((rows, self.slots), dtype=np.int16)
        self._top_costs = np.zeros((self.num + 1, self.slots))
        self._top_steps = np.zeros((self.num + 1, self.slots), dtype=np.int16)
        for length in range(self.num):
            for s in [0] if self.by_length else range(self.num - length):
                row = self._row(s, s + length)
                self._costs[row], self._steps[row] = self._solve(s, s + length)
        for s in range(self.num - 1, -1, -1):
            self._top_costs[s], self._top_steps[s] = self._solve(s, self.num)

    def _row(self, s: int, t: int) -> int:
        return t - s if self.by_length else s * self.num + t

    def _solve(self, s: int, t: int) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
        """Return R(s, t, .) and, where stages s..i-1 become a region, i - s, else 0."""
        enough = np.arange(self.slots) >= self.needs[s] - self.needs[t]
        if s == t:
            return np.where(enough, 0.0, np.inf), np.zeros(self.slots, dtype=np.int16)
        places = np.arange(s + 1, t + 1)
        if t == self.num:
            right = self._top_costs[s + 1 :]
        else:
            right = self._costs[[self._row(i, t) for i in range(s + 1, t + 1)]]
        left = self._costs[[self._row(s, i) for i in range(s, t)]]
        # The left part ends at stage i-1, whose needs may be more or less than those at t.
        costs = _less(right, self.inputs[places]) + _less(
            left, self.needs[places - 1] - self.needs[t]
        )
        again = self.until[places - 1] - self.until[s] + self.stages.last_seconds[places - 1]
        costs += again[:, None]
        keeping = np.where(enough, _less(right[:1], self.kept[s : s + 1])[0], np.inf)
        costs = np.concatenate([keeping[None], costs])
        steps = np.argmin(costs, axis=0)
        return costs[steps, np.arange(self.slots)], steps.astype(np.int16)

    def forests(self) -> Iterator[Forest]:
        """Yield the plans of the whole chain at rising memory, where the cost changes."""
        costs = self._top_costs[0]
        possible = np.flatnonzero(np.isfinite(costs))
        changes = [
            m for m in possible if m == possible[0] or costs[m] < costs[m - 1] * (1 - _ALIKE)
        ]
        if len(changes) > _MOST_FORESTS:
            chosen = np.linspace(0, len(changes) - 1, _MOST_FORESTS)
            changes = [changes[round(i)] for i in chosen]
        for slot in changes:
            yield self._forest(0, self.num, int(slot))

    def _forest(self, s: int, t: int, slot: int) -> Forest:
        """Read the regions among stages s..t that R(s, t, M) chose; slot is M - needs(t)."""
        found: list[Span] = []
        while s < min(t + 1, self.num):
            index = min(slot, self.slots - 1)
            top = t == self.num
            step = int(self._top_steps[s, index] if top else self._steps[self._row(s, t), index])
            if step == 0:
                slot -= int(self.kept[s])
                s += 1
                continue
            i = s + step
            inside = self._forest(s, i - 1, slot - int(self.needs[i - 1] - self.needs[t]))
            calls = tuple(call for stage in self.stages.calls[s:i] for call in stage)
            found.append(Span(calls, inside))
            slot -= int(self.inputs[i])
            s = i
        return tuple(found)


def _slot_bytes(stages: Stages, most: float) -> float:
    """Take a slot that divides a stage's input, so that what many stages hold adds up."""
    rough = max(most / _NUM_SLOTS, 1.0)
    inputs = stages.inputs[stages.inputs > 0]
    typical = float(np.median(inputs)) if len(inputs) else 0.0
    if typical >= rough:
        return typical / max(1, round(typical / rough))
    return typical if 4 * typical >= rough else rough


def _in_slots(sizes: NDArray[np.float64], unit: float) -> NDArray[np.int64]:
    return np.rint(sizes / unit).astype(np.int64)


def _less(rows: NDArray[np.float64], less: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each row of costs as at so many slots less memory; infinite where there is none."""
    slots = rows.shape[1]
    places = np.arange(slots)[None, :] - less[:, None]
    found = np.take_along_axis(rows, np.clip(places, 0, slots - 1), axis=1)
    return np.where(places >= 0, found, np.inf)
