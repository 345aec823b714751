"""Fit: capture a training step, decide, simulate the decision, and return it as a plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from remat.cost.devices import Device, find_device
from remat.cost.model import CostModel, cost_step
from remat.cost.workspace import measure_workspace
from remat.errors import ApplyError, BudgetError, WorkloadError
from remat.planner.blocks import find_blocks
from remat.planner.bound import lower_bound_seconds
from remat.planner.options import Option, find_options
from remat.planner.policies import AbstractPolicy, simple_policies
from remat.planner.records import Outcome, Plan, Region
from remat.planner.solver import Solution, Solver
from remat.planner.timeline import Timeline
from remat.prove.records import Simulation
from remat.prove.simulate import summarize
from remat.regions.apply import Handle, apply, install, is_applied, remove
from remat.regions.fingerprint import fingerprint
from remat.trace.capture import capture
from remat.trace.records import OpSignature
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike, check_model
from remat.units import format_bytes, format_seconds, parse_budget

# Any: batches are the user's own types.

_log = logging.getLogger(__name__)

# Kept free, relative to the peak, where kernels' own workspace could not be measured.
UNKNOWN_WORKSPACE_MARGIN = 0.05
_MOST_REPAIRS = 6

Progress = Callable[[str, float], None]


def plan(
    model: nn.Module,
    batch: Any,
    budget: int | str,
    *,
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
        time_limit_s=time_limit_s, progress=progress,
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

    Raises
    ------
    WorkloadError: if `points` is no integer >= 1; CaptureError and others as `plan`.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise WorkloadError(f"points must be an integer >= 1, got {points!r}.")
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
    ) -> None:
        started = time.monotonic()
        self._report = progress or (lambda _what, _share: None)
        check_model(model)
        if is_applied(model):
            raise ApplyError("a plan is on this model: call handle.remove() before planning anew.")
        self._model, self._batch = model, batch
        self._loss, self._optimizer = loss, optimizer
        self._report("tracing one training step", 0.0)
        self.trace = capture(model, batch, loss=loss, optimizer=optimizer)
        self._report("pricing ops", 0.3)
        self._workspace, self._is_workspace_known = self._kernel_workspace()
        if cost is None:
            if not isinstance(device, Device):
                device = find_device(device or self.trace.device_type)
            cost = CostModel(device=device)
        self.cost_model = CostModel(
            device=cost.device, seconds=cost.seconds, workspace=self._workspace
        )
        self.cost = cost_step(self.trace, self.cost_model)
        blocks = find_blocks(self.trace)
        found = find_options(self.trace, self.cost, keep=frozenset(blocks))
        self.options: tuple[Option, ...] = found.options
        self._hazards = found.hazards
        self.timeline = Timeline(self.trace, self.cost, self.options)
        self.solver = Solver(self.timeline, time_limit_s=time_limit_s)
        position_of = {o.call: p for p, o in enumerate(self.options) if not o.saved_ops}
        self.blocks = tuple(position_of[c] for c in blocks if c in position_of)
        self._keep_all = self.timeline.curve(())
        self._known: list[frozenset[int]] = [
            frozenset(self.blocks[i] for i in policy.choose(len(self.blocks)))
            for policy in simple_policies(len(self.blocks))
        ]
        self._least: Solution | None = None
        self._seconds = time.monotonic() - started

    @property
    def keep_all_peak_bytes(self) -> int:
        """Peak of the step when nothing is recomputed."""
        return self._keep_all.peak_bytes

    def plan(self, budget: int | str) -> Plan:
        """Return the plan for one budget; see `remat.plan`."""
        started = time.monotonic()
        budget_bytes = parse_budget(budget, self.keep_all_peak_bytes)
        self._report("choosing what to recompute", 0.5)
        solution, simulation = self._solve(budget_bytes)
        self._report("done", 1.0)
        return self._as_plan(
            solution, simulation, budget_bytes, time.monotonic() - started + self._seconds
        )

    def policy(self, policy: AbstractPolicy) -> Plan:
        """Return the plan that a fixed rule amounts to; see `remat.fit.plan_policy`."""
        started = time.monotonic()
        chosen = frozenset(self.blocks[i] for i in policy.choose(len(self.blocks)))
        solution = Solution(
            chosen=chosen, seconds=self.solver.cost(chosen), peak_bytes=0,
            outcome=Outcome.FEASIBLE, bound_seconds=0.0, num_rows=0, num_solves=0,
        )  # fmt: skip
        simulation = self._simulate(chosen)
        seconds = time.monotonic() - started + self._seconds
        return self._as_plan(solution, simulation, self._needed(simulation), seconds)

    def frontier(self, points: int) -> list[Plan]:
        """Return the Pareto front; see `remat.frontier`."""
        least = self._simulate(self._least_peak().chosen)
        low = self._needed(least)
        plans: list[Plan] = []
        for number, budget in enumerate(
            np.linspace(low, max(low, self.keep_all_peak_bytes), points)
        ):
            self._report(f"plan {number + 1} of {points}", number / points)
            made = self.plan(int(budget))
            if not plans or made.regions != plans[-1].regions:
                plans.append(made)
        return plans

    # -- search -----------------------------------------------------------------------------------

    def _solve(self, budget_bytes: int) -> tuple[Solution, Simulation]:
        """Solve, simulate the solution, and tighten until the simulation keeps the budget."""
        # The margin grows with the peak: the largest peak that fits with its own margin.
        allowed = budget_bytes - self._margin(budget_bytes)
        for _ in range(_MOST_REPAIRS):
            solution = self._cheapest(allowed)
            if solution is None:
                break
            simulation = self._simulate(solution.chosen)
            excess = self._needed(simulation) - budget_bytes
            if excess <= 0:
                self._known.append(solution.chosen)
                return solution, simulation
            _log.info("the simulated peak is %d bytes over the timeline's: tightening", excess)
            allowed -= excess
        least = self._least_peak()
        simulation = self._simulate(least.chosen)
        if self._needed(simulation) <= budget_bytes:
            return least, simulation
        raise BudgetError(budget_bytes, self._needed(simulation), simulation.breakdown)

    def _cheapest(self, allowed: int) -> Solution | None:
        self._report("choosing what to recompute", 0.6)
        known = [*self._known, *([self._least.chosen] if self._least is not None else [])]
        return self.solver.cheapest(allowed, known)

    def _least_peak(self) -> Solution:
        if self._least is None:
            self._report("looking for the least peak", 0.7)
            self._least = self.solver.least_peak(self._known)
        return self._least

    def _simulate(self, chosen: Iterable[int]) -> Simulation:
        """Run the step under fake tensors with the choice applied."""
        self._report("simulating the plan", 0.8)
        install(self._model, tuple(self.options[p].region() for p in sorted(chosen)))
        try:
            trace = capture(
                self._model, self._batch, loss=self._loss, optimizer=self._optimizer,
                drop_saved=False,
            )  # fmt: skip
        finally:
            remove(self._model)
        return summarize(trace, self._workspace_of(trace.signatures))

    def _needed(self, simulation: Simulation) -> int:
        """Return the least budget that a simulated plan fits, its margin included."""
        return simulation.peak_bytes + self._margin(simulation.peak_bytes)

    # -- what kernels take for themselves ---------------------------------------------------------

    def _kernel_workspace(self) -> tuple[dict[OpSignature, int], bool]:
        if self.trace.device_type != "cpu":
            return {}, False
        return dict(measure_workspace(self.trace.signatures)), True

    def _workspace_of(self, signatures: Iterable[OpSignature]) -> dict[OpSignature, int]:
        return dict(measure_workspace(signatures)) if self._is_workspace_known else {}

    def _margin(self, peak_bytes: int) -> int:
        """Return the bytes that are kept free above a simulated peak."""
        if self._is_workspace_known:
            return 0
        return int(peak_bytes * UNKNOWN_WORKSPACE_MARGIN)

    # -- the record -------------------------------------------------------------------------------

    def _as_plan(
        self, solution: Solution, simulation: Simulation, budget_bytes: int, seconds: float
    ) -> Plan:
        forward = self.cost.forward_seconds
        recomputed = sum(self.options[p].seconds for p in solution.chosen)
        fraction = recomputed / forward if forward else 0.0
        bound = lower_bound_seconds(self.timeline, self.cost, budget_bytes) / forward
        return Plan(
            fingerprint=fingerprint(self._model, self._batch, self._loss, self._optimizer),
            budget_bytes=budget_bytes,
            predicted_peak_bytes=simulation.peak_bytes,
            keep_all_peak_bytes=self.keep_all_peak_bytes,
            forward_seconds=forward,
            step_seconds=self.cost.step_seconds,
            recompute_seconds=solution.seconds,
            recompute_fraction=fraction,
            lower_bound_fraction=min(bound, fraction),
            gap=max(0.0, fraction - bound),
            outcome=solution.outcome if solution.chosen else Outcome.OPTIMAL,
            regions=self._regions(solution.chosen),
            hazards=self._hazards,
            breakdown=simulation.breakdown,
            margin_bytes=self._margin(simulation.peak_bytes),
            cost_source=self.cost_model.source,
            plan_seconds=seconds,
            notes=self._notes(solution, budget_bytes),
        )

    def _regions(self, chosen: Iterable[int]) -> tuple[Region, ...]:
        """Write each decision with what it frees at the keep-everything peak, by itself."""
        tick = int(np.argmax(self._keep_all.alive))
        regions = []
        for position in sorted(chosen):
            option = self.options[position]
            alone = self.timeline.curve([position]).alive[tick]
            freed = int(self._keep_all.alive[tick] - alone)
            seconds = option.seconds + option.overhead_seconds
            kept = f" but for {len(option.saved_ops)} saved ops" if option.saved_ops else ""
            reason = (
                f"recomputed{kept}: frees {format_bytes(freed)} at the peak, "
                f"costs {format_seconds(seconds)}"
            )
            regions.append(
                option.region().model_copy(update={"freed_bytes": freed, "reason": reason})
            )
        return tuple(regions)

    def _notes(self, solution: Solution, budget_bytes: int) -> tuple[str, ...]:
        notes = list(self.trace.notes)
        if budget_bytes >= self.keep_all_peak_bytes and not solution.chosen:
            notes.append(
                f"The budget of {format_bytes(budget_bytes)} is at or above the keep-everything "
                f"peak of {format_bytes(self.keep_all_peak_bytes)}: nothing is recomputed."
            )
        if not self._is_workspace_known:
            notes.append(
                "Kernels' own workspace could not be measured on this device: "
                f"{UNKNOWN_WORKSPACE_MARGIN:.0%} of the peak is kept free for it."
            )
        elif self._workspace:
            notes.append(
                f"Kernels' own workspace was measured here for {len(self._workspace)} op shapes "
                f"(threads: {torch.get_num_threads()}), the largest "
                f"{format_bytes(max(self._workspace.values()))}."
            )
        return tuple(notes)
