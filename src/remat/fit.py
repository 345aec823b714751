"""Fit: capture a training step, decide, simulate the decision, and return it as a plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from remat.cost.devices import Device
from remat.cost.model import CostModel
from remat.errors import ApplyError, BudgetError
from remat.planner.bound import lower_bound_seconds
from remat.planner.policies import AbstractPolicy
from remat.planner.records import Outcome, Plan
from remat.planner.solver import Solution
from remat.program import UNKNOWN_WORKSPACE_MARGIN, Program, Step
from remat.prove.records import Simulation
from remat.regions.apply import Handle, apply, is_applied
from remat.regions.fingerprint import fingerprint
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike, check_model
from remat.units import format_bytes, parse_budget, parse_host_budget

# Any: batches are the user's own types.

Progress = Callable[[str, float], None]


def plan(
    model: nn.Module,
    batch: Any,
    budget: int | str,
    *,
    host_budget: int | str | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    device: Device | str | None = None,
    cost: CostModel | None = None,
    time_limit_s: float = 8.0,
    progress: Progress | None = None,
) -> Plan:
    """Decide what to recompute so that one training step stays within a budget of bytes.

    The model, its buffers, gradients, random state and mode are left as they are, and no
    activation is allocated: model and batch may be meta or fake tensors.

    Arguments
    ---------
    budget: total peak of one training step on the device, as bytes, `"8GiB"`, or `"60%"` of the
        keep-everything peak.
    host_budget: most bytes of host memory, as bytes or `"4GiB"`, that may hold saved tensors and
        inputs of regions between forward and backward; by default nothing is offloaded.
    loss: `(model, batch) -> scalar tensor`; by default the loss is taken from the model's output.
    optimizer: `(parameters) -> Optimizer`, an optimizer, or `None` to count no optimizer step.
    device: row of the device table whose speed prices ops; default by the model's device.
    cost: prices of ops instead, for example measured ones (`remat.measure_cost`).
    time_limit_s: longest search; the best plan found by then is returned as `timed_out`.
    progress: called with what is being done and the share done, 0 to 1.

    Raises
    ------
    BudgetFormatError: if the budget cannot be read.
    BudgetError: if no plan that was found stays within it; says the least peak that was reached.
    WorkloadError, CaptureError: if model, batch, loss or optimizer make no step that can be traced.
    """
    if not (isinstance(budget, str) and budget.strip().endswith("%")):
        parse_budget(budget)  # an unreadable budget is said before the step is traced
    fit = Fit(
        model, batch, loss=loss, optimizer=optimizer, device=device, cost=cost,
        time_limit_s=time_limit_s, progress=progress, host_budget=host_budget,
    )  # fmt: skip
    return fit.plan(budget)


def plan_policy(
    model: nn.Module,
    batch: Any,
    policy: AbstractPolicy,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    device: Device | str | None = None,
    cost: CostModel | None = None,
) -> Plan:
    """Return the plan that a fixed rule, such as `AllBlocks()`, amounts to.

    Its budget is its own predicted peak. See `plan` for the arguments and errors.
    """
    return Fit(
        model, batch, loss=loss, optimizer=optimizer, device=device, cost=cost
    ).policy(policy)  # fmt: skip


def frontier(
    model: nn.Module,
    batch: Any,
    *,
    points: int = 8,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    device: Device | str | None = None,
    cost: CostModel | None = None,
    time_limit_s: float = 8.0,
    progress: Progress | None = None,
) -> list[Plan]:
    """Return plans at evenly spaced budgets from the least reachable to the keep-everything peak.

    Ordered by budget, without duplicates: the Pareto front of bytes against seconds.
    """
    fit = Fit(
        model, batch, loss=loss, optimizer=optimizer, device=device, cost=cost,
        time_limit_s=time_limit_s, progress=progress,
    )  # fmt: skip
    return fit.frontier(points)


def auto_checkpoint(
    model: nn.Module,
    batch: Any,
    memory_budget: int | str,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> Handle:
    """Plan and apply in one line; the handle's `remove()` restores the model.

    Example
    -------
    ```python
    handle = remat.auto_checkpoint(model, batch, memory_budget="8GiB")
    ```
    """
    return apply(model, plan(model, batch, memory_budget, loss=loss, optimizer=optimizer))


class Fit:
    """One traced step, from which plans for any number of budgets and policies are made."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        loss: Loss | None = None,
        optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
        device: Device | str | None = None,
        cost: CostModel | None = None,
        time_limit_s: float = 8.0,
        progress: Progress | None = None,
        host_budget: int | str | None = None,
    ) -> None:
        started = time.monotonic()
        host_budget_bytes = None if host_budget is None else parse_host_budget(host_budget)
        self._report = progress or (lambda _what, _share: None)
        check_model(model)
        if is_applied(model):
            raise ApplyError("a plan is on this model: call handle.remove() before planning anew.")
        self._step = Step(model, batch, loss, optimizer)
        self.plain = Program(
            self._step, device=device, cost=cost, time_limit_s=time_limit_s, report=self._report,
            host_budget_bytes=host_budget_bytes,
        )  # fmt: skip
        self._seconds = time.monotonic() - started

    @property
    def keep_all_peak_bytes(self) -> int:
        """Peak of the step when nothing is recomputed."""
        return self.plain.keep_all_peak_bytes

    def plan(self, budget: int | str) -> Plan:
        """Return the plan for one budget; see `remat.plan`."""
        started = time.monotonic()
        budget_bytes = parse_budget(budget, self.keep_all_peak_bytes)
        self._report("choosing what to recompute", 0.5)
        solved = self.plain.solve(budget_bytes)
        if solved is None:
            _, least = self.plain.least_peak()
            raise BudgetError(
                budget_bytes,
                self.plain.needed(least),
                least.breakdown,
                host_budget_bytes=self.plain.host_budget_bytes,
            )
        self._report("done", 1.0)
        seconds = time.monotonic() - started + self._seconds
        return self._as_plan(*solved, budget_bytes, seconds)

    def policy(self, policy: AbstractPolicy) -> Plan:
        """Return the plan that a fixed rule amounts to; see `remat.fit.plan_policy`."""
        started = time.monotonic()
        solution, simulation = self.plain.policy(policy)
        seconds = time.monotonic() - started + self._seconds
        return self._as_plan(solution, simulation, self.plain.needed(simulation), seconds)

    def frontier(self, points: int) -> list[Plan]:
        """Return the Pareto front; see `remat.frontier`."""
        low = self.plain.needed(self.plain.least_peak()[1])
        plans: list[Plan] = []
        for number, budget in enumerate(
            np.linspace(low, max(low, self.keep_all_peak_bytes), max(points, 1))
        ):
            self._report(f"plan {number + 1} of {points}", number / max(points, 1))
            made = self.plan(int(budget))
            if not plans or made.regions != plans[-1].regions:
                plans.append(made)
        return plans

    # -- the record -------------------------------------------------------------------------------

    def _as_plan(
        self, solution: Solution, simulation: Simulation, budget_bytes: int, seconds: float
    ) -> Plan:
        program, step = self.plain, self._step
        forward = program.cost.forward_seconds
        recomputed = sum(program.options[p].seconds for p in solution.chosen)
        fraction = recomputed / forward if forward else 0.0
        # What waits on the host need not be recomputed: the bound holds with that much more memory.
        memory = budget_bytes + (program.host_budget_bytes or 0)
        bound = lower_bound_seconds(program.timeline, program.cost, memory) / forward
        return Plan(
            fingerprint=fingerprint(step.model, step.batch, step.loss, step.optimizer),
            budget_bytes=budget_bytes,
            predicted_peak_bytes=simulation.peak_bytes,
            keep_all_peak_bytes=self.keep_all_peak_bytes,
            forward_seconds=forward,
            step_seconds=program.cost.step_seconds,
            recompute_seconds=solution.seconds,
            recompute_fraction=fraction,
            lower_bound_fraction=min(bound, fraction),
            gap=max(0.0, fraction - bound),
            outcome=solution.outcome if solution.chosen else Outcome.OPTIMAL,
            regions=program.regions(solution.chosen),
            hazards=program.hazards,
            breakdown=simulation.breakdown,
            margin_bytes=program.margin(simulation.peak_bytes),
            cost_source=program.cost_model.source,
            plan_seconds=seconds,
            host_budget_bytes=program.host_budget_bytes,
            notes=self._notes(solution, budget_bytes),
        )

    def _notes(self, solution: Solution, budget_bytes: int) -> tuple[str, ...]:
        program = self.plain
        notes = list(program.trace.notes)
        if budget_bytes >= self.keep_all_peak_bytes and not solution.chosen:
            notes.append(
                f"The budget of {format_bytes(budget_bytes)} is at or above the keep-everything "
                f"peak of {format_bytes(self.keep_all_peak_bytes)}: nothing is recomputed."
            )
        if not program.is_workspace_known:
            notes.append(
                "Kernels' own workspace could not be measured on this device: "
                f"{UNKNOWN_WORKSPACE_MARGIN:.0%} of the peak is kept free for it."
            )
        elif program.workspace:
            notes.append(
                f"Kernels' own workspace was measured here for {len(program.workspace)} op shapes "
                f"(threads: {torch.get_num_threads()}), the largest "
                f"{format_bytes(max(program.workspace.values()))}."
            )
        return tuple(notes)
