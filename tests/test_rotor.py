"""The dynamic programme of chains against every schedule of small chains, run step by step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from benchmarks.rotor import (
    Keep,
    Plan,
    Redo,
    Rotor,
    Scheduled,
    Stage,
    peak_of,
    plan_as_data,
    plan_from_data,
    seconds_again,
)
from benchmarks.zoo import ZOO


def all_plans(first: int, last: int) -> Iterator[Plan]:
    """Every persistent schedule of stages first..last."""
    if first == last:
        yield (Keep(first),)
        return
    for rest in all_plans(first + 1, last):
        yield (Keep(first), *rest)
    for middle in range(first + 1, last + 1):
        for inner in all_plans(first, middle - 1):
            for rest in all_plans(middle, last):
                yield (Redo(inner), *rest)


class Machine:
    """Runs a schedule on sizes alone, one step after another, and notes the most that is held."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.held: dict[object, int] = {}
        self.most = 0
        self.seconds = 0.0

    def during(self, working: int) -> None:
        self.most = max(self.most, sum(self.held.values()) + working)

    def run(self, plan: Plan) -> None:
        for position, part in enumerate(plan):
            if isinstance(part, Keep):
                self._save(part.stage)
                self.run(plan[position + 1 :])
                self._backward(part.stage)
                return
            self._pass(part.start, part.stop)
            self.run(plan[position + 1 :])
            self.held.pop(("input", part.stop), None)
            self.run(part.inner)
            return

    def _pass(self, first: int, stop: int) -> None:
        for number in range(first, stop):
            stage = self.stages[number]
            self.held["input", number + 1] = stage.output
            self.during(stage.forward_working)
            if number > first:
                del self.held["input", number]
            self.seconds += stage.seconds

    def _save(self, number: int) -> None:
        stage = self.stages[number]
        self.held["saved", number] = stage.saved
        self.during(stage.saving_working)
        self.seconds += stage.seconds

    def _backward(self, number: int) -> None:
        stage = self.stages[number]
        self.held["gradient", number] = stage.gradient  # from the next stage, or the loss
        self.during(stage.backward_working)
        del self.held["saved", number], self.held["gradient", number]
        self.held["kept", number] = stage.kept
        if number:
            self.held["gradient", number - 1] = self.stages[number - 1].gradient


def small_chain(count: int, seed: int) -> list[Stage]:
    draw = random.Random(seed)
    return [
        Stage(
            seconds=float(draw.randint(1, 9)),
            output=(size := draw.randint(1, 4)),
            saved=size + draw.randint(0, 6),
            gradient=0 if number == count - 1 else size,
            forward_working=draw.randint(0, 3),
            saving_working=draw.randint(0, 3),
            # The gradient of the input is made while all that backward reads is still there.
            backward_working=4 + draw.randint(0, 3),
            kept=draw.randint(0, 2),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (5, 5)])
def test_rotor_equals_every_schedule_of_a_small_chain(count: int, seed: int) -> None:
    """At every memory, no schedule that runs within it computes less again."""
    stages = small_chain(count, seed)
    forward = sum(s.seconds for s in stages)
    tried = []
    for plan in all_plans(0, count - 1):
        machine = Machine(stages)
        machine.run(plan)
        assert machine.most == peak_of(stages, plan)
        assert machine.seconds == pytest.approx(forward + seconds_again(stages, plan))
        tried.append((machine.most, machine.seconds - forward))
    most = max(peak for peak, _ in tried)
    rotor = Rotor(stages, most)
    for memory in range(most + 1):
        best = min((again for peak, again in tried if peak <= memory), default=None)
        found = rotor.solve(memory)
        if best is None or found is None:
            assert best is None
            assert found is None
            continue
        assert found[0] == pytest.approx(best)
        assert seconds_again(stages, found[1]) == pytest.approx(best)
        assert peak_of(stages, found[1]) <= memory


def test_schedules_run_with_the_gradients_of_the_plain_chain() -> None:
    """A nested schedule of a real chain changes no bit of any gradient, dropout on."""
    case = ZOO["chain6"].build(dropout=0.1)
    assert case.loss is not None
    plan = plan_from_data([[[0, 1], 2], 3, [4], 5, 6])
    assert plan_as_data(plan) == [[[0, 1], 2], 3, [4], 5, 6]
    found = []
    for model in (case.model, Scheduled(case.model, plan)):
        case.model.zero_grad()
        torch.manual_seed(3)
        case.loss(model, case.batch).backward()
        found.append([p.grad.clone() for p in case.model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(itertools.starmap(torch.equal, zip(*found, strict=True)))
