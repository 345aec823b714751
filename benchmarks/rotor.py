"""Rotor: the optimal persistent schedule of a chain, by dynamic programming.

The method is that of Beaumont, Eyraud-Dubois, Hermann, Joly and Shilova, "Optimal checkpointing
for heterogeneous chains: how to train deep neural networks with limited memory" (2019),
arXiv:1911.13214, section 4: the recurrence of its theorem 1, written down here anew. A schedule is
persistent if what it stores stays stored until the backward step that reads it. Among these it is
optimal for the sizes given, in time O(n^3 M) and memory O(n^2 M) for M slots of memory.

Two things are finer than in the paper. Gradients of parameters appear stage by stage, as they do
in torch, instead of all being there from the start; and the memory of a forward step is asked of
the steps that a choice makes, not of all in its reach.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from remat.cost.model import StepCost
from remat.planner.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a chain; the sizes in any one unit, the letters those of the paper.

    `seconds` is the forward time u_F. `output` is the size of a, `saved` that of a-bar: all that
    backward needs of the stage, its output included. `gradient` is the size of delta, the gradient
    of the output. The working sets come beside these: `forward_working` of a forward step that
    saves nothing, `saving_working` of one that saves, `backward_working` of the backward step, its
    result and the gradients of its parameters included. `kept` is what the backward step leaves
    for the rest of the step: the gradients of its parameters. `stopped` are the seconds at its end
    that torch leaves out where a recomputation ends with it, since nothing after is saved; the
    programme does not know of them.
    """

    seconds: float
    output: int
    saved: int
    gradient: int = 0
    forward_working: int = 0
    saving_working: int = 0
    backward_working: int = 0
    kept: int = 0
    stopped: float = 0.0


@dataclass(frozen=True, slots=True)
class Keep:
    """A forward step of one stage that saves what backward needs."""

    stage: int


@dataclass(frozen=True, slots=True)
class Redo:
    """Forward steps of which only the input is stored; later they run again as `inner`."""

    inner: Plan

    @property
    def stop(self) -> int:
        """The first stage after it."""
        last = self.inner[-1]
        return last.stage + 1 if isinstance(last, Keep) else last.stop

    @property
    def start(self) -> int:
        """Its first stage."""
        first = self.inner[0]
        return first.stage if isinstance(first, Keep) else first.start


Plan = tuple[Keep | Redo, ...]


class Rotor:
    """The table of least recomputation for every part of a chain and every memory up to a limit."""

    def __init__(self, stages: Sequence[Stage], memory: int) -> None:
        self.stages = stages
        self._memory = memory
        count = len(stages)
        self._kept_after = [sum(s.kept for s in stages[t + 1 :]) for t in range(count)]
        self._until = np.concatenate([[0.0], np.cumsum([s.seconds for s in stages])])
        # (first, last) -> extra forward seconds by memory, and the choice: 0 keeps, k redoes k.
        self._best: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._choice: dict[tuple[int, int], NDArray[np.int16]] = {}
        for length in range(count):
            for first in range(count - length):
                self._fill(first, first + length)

    def solve(self, memory: int) -> tuple[float, Plan] | None:
        """Return the least seconds recomputed within a memory, and the schedule, if any."""
        first, last = 0, len(self.stages) - 1
        if memory < 0:
            return None
        memory = min(memory, self._memory)
        seconds = float(self._best[first, last][memory])
        return (seconds, self._plan(first, last, memory)) if np.isfinite(seconds) else None

    def _fill(self, first: int, last: int) -> None:
        """Apply theorem 1 to one part: C_BP(s, t, m) = min(C_1(s, t, m), C_2(s, t, m))."""
        stage = self.stages[first]
        best = np.full(self._memory + 1, np.inf)
        choice = np.zeros(self._memory + 1, dtype=np.int16)
        least = need_to_keep(self.stages, first, last, self._kept_after)
        if least <= self._memory:
            # C_2: the first stage saves all, the others have that much less memory.
            rest = 0.0 if first == last else self._shifted(first + 1, last, stage.saved)
            best[least:] = rest if first == last else rest[least:]
        for middle in range(first + 1, last + 1):
            # C_1: forward to `middle`, the rest with its input stored, then the first part again.
            least = need_to_pass(self.stages, first, middle, last, self._kept_after)
            if least > self._memory:
                break
            again = self._until[middle] - self._until[first]
            total = again + self._best[first, middle - 1]
            total = total + self._shifted(middle, last, self.stages[middle - 1].output)
            total[:least] = np.inf
            better = total < best - 1e-15
            best[better] = total[better]
            choice[better] = middle - first
        self._best[first, last] = best
        self._choice[first, last] = choice

    def _shifted(self, first: int, last: int, by: int) -> NDArray[np.float64]:
        known = self._best[first, last]
        if by > self._memory:
            return np.full_like(known, np.inf)
        return np.concatenate([np.full(by, np.inf), known[: len(known) - by]])

    def _plan(self, first: int, last: int, memory: int) -> Plan:
        redone = int(self._choice[first, last][memory])
        if not redone:
            if first == last:
                return (Keep(first),)
            left = memory - self.stages[first].saved
            return (Keep(first), *self._plan(first + 1, last, left))
        middle = first + redone
        inner = self._plan(first, middle - 1, memory)
        left = memory - self.stages[middle - 1].output
        return (Redo(inner), *self._plan(middle, last, left))


def need_to_keep(stages: Sequence[Stage], first: int, last: int, kept_after: Sequence[int]) -> int:
    """Return the memory that saving stage `first` of a part needs, forward and backward: m_all."""
    stage = stages[first]
    forward = stages[last].gradient + stage.saved + stage.saving_working + kept_after[last]
    backward = stage.gradient + stage.saved + stage.backward_working + kept_after[first]
    return max(forward, backward)


def need_to_pass(
    stages: Sequence[Stage], first: int, middle: int, last: int, kept_after: Sequence[int]
) -> int:
    """Return the memory that running `first`..`middle` without saving needs: m_empty."""
    most, before = 0, 0  # the input of the first is stored outside
    for stage in stages[first:middle]:
        most = max(most, before + stage.output + stage.forward_working)
        before = stage.output
    return stages[last].gradient + most + kept_after[last]


def seconds_again(stages: Sequence[Stage], plan: Plan) -> float:
    """Return the forward seconds that a schedule spends beyond one forward pass."""
    return sum(
        sum(s.seconds for s in stages[part.start : part.stop]) + seconds_again(stages, part.inner)
        for part in plan
        if isinstance(part, Redo)
    )


def seconds_stopped(stages: Sequence[Stage], plan: Plan) -> float:
    """Return the forward seconds that torch leaves out by stopping each recomputation early."""
    total = 0.0
    for part in plan:
        if isinstance(part, Redo):
            last = part.inner[-1]
            total += stages[last.stage].stopped if isinstance(last, Keep) else 0.0
            total += seconds_stopped(stages, part.inner)
    return total


# -- a chain of torch -------------------------------------------------------------------------


def chain_stages(
    timeline: Timeline, cost: StepCost, blocks: Sequence[int]
) -> tuple[list[Stage], int]:
    """Describe a traced model that is blocks one after another, then a tail, as a chain.

    `blocks` are the calls of the blocks. Returns the stages, in bytes, and what lives outside the
    chain. The sizes are read off the curve of the step in which nothing is recomputed.
    """
    trace = timeline.trace
    alive = timeline.curve(()).alive - timeline.base_bytes
    calls = [trace.calls[number] for number in blocks]
    starts = [call.start for call in calls]
    backward = trace.phase_start["backward"]
    optimizer = trace.phase_start.get("optimizer", trace.num_ticks)
    edges = [*starts, calls[-1].end, backward]
    # What each part adds to what is held: the bytes alive when the next one starts.
    held = [int(alive[tick]) for tick in edges]
    saved = [after - before for before, after in itertools.pairwise(held)]
    outputs = [sum(trace.storages[s].size_bytes for s in call.outputs) for call in calls]
    seconds = [sum(cost.op_seconds[c.first_op : c.stop_op]) for c in calls]
    tail = sum(
        cost.op_seconds[number]
        for number, op in enumerate(trace.ops)
        if op.phase == "forward" and op.tick > calls[-1].end
    )
    handles = [[h for h in trace.handles if c.start <= h.pack <= c.end] for c in calls]
    begins = [min(h.unpack for h in found if h.unpack >= 0) for found in handles]
    spans = [
        (begin, optimizer if number == 0 else begins[number - 1])
        for number, begin in enumerate(begins)
    ]
    gradients = [int(trace.storages[s].size_bytes) for s in _gradient_storages(timeline)]
    births = [trace.storages[s].birth for s in _gradient_storages(timeline)]
    kept = [
        sum(size for size, birth in zip(gradients, births, strict=True) if begin <= birth < end)
        for begin, end in spans
    ]
    tail_kept = sum(gradients) - sum(kept)
    stages = []
    for number, call in enumerate(calls):
        before = held[number]
        most = int(alive[call.start : call.end + 1].max()) - before
        begin, end = spans[number]
        after = sum(kept[number + 1 :]) + tail_kept
        need = int(alive[begin:end].max()) - before - after
        stages.append(
            Stage(
                seconds=seconds[number],
                output=outputs[number],
                saved=saved[number],
                gradient=outputs[number],
                forward_working=_working_set(timeline, call.start, call.end) - outputs[number],
                saving_working=max(0, most - saved[number]),
                backward_working=max(0, need - saved[number] - outputs[number]),
                kept=kept[number],
                stopped=sum(
                    cost.op_seconds[max(h.ops_before for h in handles[number]) : call.stop_op]
                ),
            )
        )
    most = int(alive[calls[-1].end : begins[-1]].max()) - held[-2]
    tail_saved = max(0, saved[-1])
    stages.append(
        Stage(
            seconds=tail, output=0, saved=tail_saved, saving_working=max(0, most - tail_saved),
            kept=tail_kept,
        )
    )  # fmt: skip
    return stages, timeline.base_bytes + held[0]


def _gradient_storages(timeline: Timeline) -> list[int]:
    return [i for i, s in enumerate(timeline.trace.storages) if s.kind == "gradients"]


def _working_set(timeline: Timeline, start: int, end: int) -> int:
    """Return the most bytes born within a call that live without backward holding them."""
    changes: dict[int, int] = {}
    for storage in timeline.trace.storages:
        if not start < storage.birth <= end:
            continue
        for first, last in storage.intervals:
            changes[first] = changes.get(first, 0) + storage.size_bytes
            changes[min(last, end) + 1] = changes.get(min(last, end) + 1, 0) - storage.size_bytes
    alive = most = 0
    for tick in sorted(changes):
        alive += changes[tick]
        most = max(most, alive)
    return most


def in_slots(stages: Sequence[Stage], slot: int) -> list[Stage]:
    """Round the sizes of a chain up to slots of memory."""

    def slots(size: int) -> int:
        return -(-size // slot)

    return [
        Stage(
            seconds=s.seconds, output=slots(s.output), saved=slots(s.saved),
            gradient=slots(s.gradient), forward_working=slots(s.forward_working),
            saving_working=slots(s.saving_working), backward_working=slots(s.backward_working),
            kept=slots(s.kept),
        )
        for s in stages
    ]  # fmt: skip


class Scheduled(nn.Module):
    """An `nn.Sequential` whose blocks run by a schedule, with nested checkpoints."""

    def __init__(self, model: nn.Sequential, plan: Plan) -> None:
        super().__init__()
        self.model = model
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain; the schedule's last stage, all that is not a block, runs as it is."""
        num_blocks = _num_stages(self.plan) - 1
        x = self._run(x, self.plan, num_blocks)
        for module in list(self.model)[num_blocks:]:
            x = module(x)
        return x

    def _run(self, x: Tensor, plan: Plan, num_blocks: int) -> Tensor:
        for part in plan:
            if isinstance(part, Redo):
                x = checkpoint(self._run, x, part.inner, num_blocks, use_reentrant=False)
            elif part.stage < num_blocks:
                x = self.model[part.stage](x)
        return x


def _num_stages(plan: Plan) -> int:
    last = plan[-1]
    return last.stage + 1 if isinstance(last, Keep) else last.stop


def plan_as_data(plan: Plan) -> list:
    """Turn a schedule into JSON: a number keeps a stage, a list runs again as it says."""
    return [part.stage if isinstance(part, Keep) else plan_as_data(part.inner) for part in plan]


def plan_from_data(data: list) -> Plan:
    """Read what `plan_as_data` wrote."""
    return tuple(
        Keep(part) if isinstance(part, int) else Redo(plan_from_data(part)) for part in data
    )


def peak_of(stages: Sequence[Stage], plan: Plan) -> int:
    """Return the memory that a schedule needs by the model of the chain."""
    kept_after = [sum(s.kept for s in stages[t + 1 :]) for t in range(len(stages))]
    return _peak(stages, plan, kept_after)


def _peak(stages: Sequence[Stage], plan: Plan, kept_after: Sequence[int]) -> int:
    last = _num_stages(plan) - 1
    held, most = 0, 0
    for part in plan:
        if isinstance(part, Keep):
            most = max(most, held + need_to_keep(stages, part.stage, last, kept_after))
            held += stages[part.stage].saved
            continue
        passing = need_to_pass(stages, part.start, part.stop, last, kept_after)
        most = max(most, held + passing, held + _peak(stages, part.inner, kept_after))
        held += stages[part.stop - 1].output
    return most
