"""Program: one traced training step with its options, its timeline and the search over them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from remat.cost.devices import Device, find_device
from remat.cost.model import CostModel, cost_step
from remat.cost.workspace import measure_workspace
from remat.planner.blocks import find_blocks
from remat.planner.offload import find_offloads
from remat.planner.options import Option, find_options
from remat.planner.policies import AbstractPolicy, simple_policies
from remat.planner.records import Outcome, Region
from remat.planner.recursion import find_recursions, spans_of
from remat.planner.solver import Solution, Solver
from remat.planner.timeline import Timeline
from remat.prove.records import Simulation
from remat.prove.simulate import summarize
from remat.regions.apply import host_peak_bytes, install, remove
from remat.trace.capture import capture
from remat.trace.records import OpSignature
from remat.trace.step import Loss, OptimizerLike
from remat.units import format_bytes, format_seconds

# Any: batches are the user's own types.

_log = logging.getLogger(__name__)

# Kept free, relative to the peak, where kernels' own workspace could not be measured.
UNKNOWN_WORKSPACE_MARGIN = 0.05
_MOST_REPAIRS = 6

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Step:
    """What is trained: everything that a step is traced from."""

    model: nn.Module
    batch: Any
    loss: Loss | None
    optimizer: OptimizerLike


class Program:
    """One trace of a step, from which choices of regions for any number of budgets are made."""

    def __init__(
        self,
        step: Step,
        *,
        device: Device | str | None,
        cost: CostModel | None,
        time_limit_s: float,
        report: Report,
        host_budget_bytes: int | None = None,
    ) -> None:
        self._step, self._report = step, report
        self._report("tracing one training step", 0.0)
        self.trace = capture(
            step.model, step.batch, loss=step.loss, optimizer=step.optimizer
        )  # fmt: skip
        self._report("pricing ops", 0.3)
        self.workspace, self.is_workspace_known = self._kernel_workspace()
        if cost is None:
            if not isinstance(device, Device):
                device = find_device(device or self.trace.device_type)
            cost = CostModel(device=device)
        self.cost_model = dataclasses.replace(cost, workspace=self.workspace)
        self.cost = cost_step(self.trace, self.cost_model)
        blocks = find_blocks(self.trace)
        forests = find_recursions(self.trace, self.cost)
        found = find_options(self.trace, self.cost, keep=frozenset(blocks), spans=spans_of(forests))
        self.options: tuple[Option, ...] = found.options
        self.host_budget_bytes = host_budget_bytes
        if host_budget_bytes is not None:
            self.options += find_offloads(self.trace, self.cost, found.options)
        self.hazards = found.hazards
        self.timeline = Timeline(self.trace, self.cost, self.options)
        self.solver = Solver(
            self.timeline, time_limit_s=time_limit_s, host_budget_bytes=host_budget_bytes
        )
        position_of = {
            o.call: p for p, o in enumerate(self.options) if o.is_single and not o.saved_ops
        }
        self.blocks = tuple(position_of[c] for c in blocks if c in position_of)
        self._keep_all = self.timeline.curve(())
        self._known: list[frozenset[int]] = [
            frozenset(self.blocks[i] for i in policy.choose(len(self.blocks)))
            for policy in simple_policies(len(self.blocks))
        ]
        place = {option.parts[0].span: p for p, option in enumerate(found.options)}
        self._known += [
            frozenset(place[span] for span in forest if span in place) for forest in forests
        ]
        self._least: tuple[Solution, Simulation] | None = None

    @property
    def keep_all_peak_bytes(self) -> int:
        """Peak of the step when nothing is recomputed."""
        return self._keep_all.peak_bytes

    # -- search -----------------------------------------------------------------------------------

    def solve(self, budget_bytes: int) -> tuple[Solution, Simulation] | None:
        """Solve, simulate the solution, and tighten until the simulation keeps the budget.

        Returns `None` where even the least peak that is found is above the budget.
        """
        # The margin grows with the peak: the largest peak that fits with its own margin.
        allowed = budget_bytes - self.margin(budget_bytes)
        for _ in range(_MOST_REPAIRS):
            solution = self._cheapest(allowed)
            if solution is None:
                break
            simulation = self.simulate(solution.chosen)
            excess = self.needed(simulation) - budget_bytes
            if excess <= 0:
                self._known.append(solution.chosen)
                return solution, simulation
            _log.info("the simulated peak is %d bytes over the timeline's: tightening", excess)
            allowed -= excess
        least, simulation = self.least_peak()
        return (least, simulation) if self.needed(simulation) <= budget_bytes else None

    def least_peak(self) -> tuple[Solution, Simulation]:
        """Return the choice of the least peak that is found, and its simulation."""
        if self._least is None:
            self._report("looking for the least peak", 0.7)
            least = self.solver.least_peak(self._known)
            self._least = least, self.simulate(least.chosen)
        return self._least

    def policy(self, policy: AbstractPolicy) -> tuple[Solution, Simulation]:
        """Return the choice that a fixed rule amounts to, and its simulation."""
        chosen = frozenset(self.blocks[i] for i in policy.choose(len(self.blocks)))
        solution = Solution(
            chosen=chosen, seconds=self.solver.cost(chosen), peak_bytes=0,
            outcome=Outcome.FEASIBLE, bound_seconds=0.0, num_rows=0, num_solves=0,
        )  # fmt: skip
        return solution, self.simulate(chosen)

    def _cheapest(self, allowed: int) -> Solution | None:
        self._report("choosing what to recompute", 0.6)
        known = [*self._known, *([self._least[0].chosen] if self._least is not None else [])]
        return self.solver.cheapest(allowed, known)

    # -- simulation -------------------------------------------------------------------------------

    def simulate(self, chosen: Iterable[int]) -> Simulation:
        """Run the step under fake tensors with the choice applied."""
        self._report("simulating the plan", 0.8)
        step = self._step
        install(step.model, tuple(r for p in sorted(chosen) for r in self.options[p].regions()))
        try:
            trace = capture(
                step.model, step.batch, loss=step.loss, optimizer=step.optimizer, drop_saved=False
            )
            host_bytes = host_peak_bytes(step.model)
        finally:
            remove(step.model)
        return summarize(trace, self._workspace_of(trace.signatures), host_bytes)

    def needed(self, simulation: Simulation) -> int:
        """Return the least budget that a simulated plan fits, its margin included."""
        return simulation.peak_bytes + self.margin(simulation.peak_bytes)

    def margin(self, peak_bytes: int) -> int:
        """Return the bytes that are kept free above a simulated peak."""
        if self.is_workspace_known:
            return 0
        return int(peak_bytes * UNKNOWN_WORKSPACE_MARGIN)

    def _kernel_workspace(self) -> tuple[dict[OpSignature, int], bool]:
        if self.trace.device_type != "cpu":
            return {}, False
        return dict(measure_workspace(self.trace.signatures)), True

    def _workspace_of(self, signatures: Iterable[OpSignature]) -> dict[OpSignature, int]:
        return dict(measure_workspace(signatures)) if self.is_workspace_known else {}

    # -- the decisions as data --------------------------------------------------------------------

    def regions(self, chosen: Iterable[int]) -> tuple[Region, ...]:
        """Write each decision with what it frees at the keep-everything peak, by itself."""
        tick = int(np.argmax(self._keep_all.alive))
        regions = []
        for position in sorted(chosen):
            option = self.options[position]
            alone = self.timeline.curve([position]).alive[tick]
            freed = int(self._keep_all.alive[tick] - alone)
            seconds = option.seconds + option.overhead_seconds
            kept = f" but for {len(option.saved_ops)} saved ops" if option.saved_ops else ""
            how = f"recomputed{kept}" if option.is_recomputed else "offloaded"
            moved = f"{format_bytes(option.host_bytes)} on the host, " if option.host_bytes else ""
            reason = (
                f"{how}: frees {format_bytes(freed)} at the peak, {moved}"
                f"costs {format_seconds(seconds)}"
            )
            outer, *nested = option.regions()
            figures = {"freed_bytes": freed, "recompute_seconds": seconds, "reason": reason}
            regions += [outer.model_copy(update=figures), *nested]
        return tuple(regions)
