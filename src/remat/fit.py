"""Fit: capture a training step, decide, simulate the decision, and return it as a plan."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from remat.cost.devices import Device
from remat.cost.model import CostModel
from remat.cost.usual import step_error_bar
from remat.errors import ApplyError, BudgetError, WorkloadError
from remat.planner.bound import lower_bound_seconds
from remat.planner.policies import AbstractPolicy
from remat.planner.records import Outcome, Plan, Region, Rewrite
from remat.planner.solver import Solution
from remat.program import Program, Step
from remat.prove.records import Simulation
from remat.regions.apply import Handle, apply, is_applied
from remat.regions.fingerprint import fingerprint
from remat.rewriting.programs import (
    rewrite_notes,
    with_sliced_blocks,
    with_sliced_heads,
    with_sliced_tokens,
)
from remat.trace.parallel import is_wrapped
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
    chunks: bool | None = None,
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
    device: row of the device table, or a `Device`; default by the model's. It prices ops; for a
        model on the CPU or meta, a row of another kind also decides which kernels run, and on CUDA
        the budget means what the caching allocator reserves, and the context.
    cost: prices of ops instead, for example measured ones (`remat.measure_cost`).
    chunks: whether a projection to classes with its cross entropy, and token-wise modules such as
        MLPs, may run in slices, which gives up bit identity for order of summation: `None` where
        the budget cannot be met otherwise, `True` wherever that is cheaper, `False` never. Unless
        `False`, the last resort is to run every block in slices of the batch.
    time_limit_s: longest search, in seconds of the processor; the best plan found by then is
        returned as `timed_out`.
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
        model, batch, loss=loss, optimizer=optimizer, device=device, cost=cost, chunks=chunks,
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
    chunks: bool | None = None,
    time_limit_s: float = 8.0,
    progress: Progress | None = None,
) -> list[Plan]:
    """Return plans at evenly spaced budgets from the least reachable to the keep-everything peak.

    Ordered by budget, without duplicates: the Pareto front of bytes against seconds. See `plan` for
    the arguments. With `chunks=None` the least is that of recomputation alone.

    Raises
    ------
    WorkloadError: if `points` is no integer >= 1; CaptureError and others as `plan`.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise WorkloadError(f"points must be an integer >= 1, got {points!r}.")
    fit = Fit(
        model, batch, loss=loss, optimizer=optimizer, device=device, cost=cost, chunks=chunks,
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
    chunks: bool | None = None,
) -> Handle:
    """Plan and apply in one line; the handle's `remove()` restores the model.

    Example
    -------
    ```python
    handle = remat.auto_checkpoint(model, batch, memory_budget="8GiB")
    ```
    """
    made = plan(model, batch, memory_budget, loss=loss, optimizer=optimizer, chunks=chunks)
    return apply(model, made)


class Fit:
    """One step as programs, from which plans for any number of budgets and policies are made.

    The plain program is the step as it is written. Where `chunks` allows them, rewritten programs
    stand beside it, each with its own trace; they are traced when they are first needed.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        loss: Loss | None = None,
        optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
        device: Device | str | None = None,
        cost: CostModel | None = None,
        chunks: bool | None = None,
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
        if chunks not in (None, True, False):
            raise WorkloadError(f"chunks must be None, True or False, got {chunks!r}.")
        if is_wrapped(model):
            if chunks:
                raise WorkloadError(
                    "chunks=True is not planned for a model that is wrapped for several processes: "
                    "what runs in slices would exchange gradients and parameters in each."
                )
            chunks = False
        self._step, self._chunks = Step(model, batch, loss, optimizer), chunks

        make = functools.partial(
            Program, self._step, device=device, cost=cost, time_limit_s=time_limit_s,
            report=self._report, host_budget_bytes=host_budget_bytes,
        )  # fmt: skip
        self.plain = make()
        self._make = lambda rewrites: make(rewrites=rewrites, like=self.plain.trace)
        self._rewritten: tuple[Program, ...] | None = None
        self._narrowed: tuple[Program, ...] | None = None
        self._last_resort: tuple[Program, ...] | None = None
        self._seconds = time.monotonic() - started

    @property
    def keep_all_peak_bytes(self) -> int:
        """Peak of the step when nothing is recomputed, counted as a budget is."""
        return self.plain.keep_all_peak_bytes

    def plan(self, budget: int | str) -> Plan:
        """Return the plan for one budget; see `remat.plan`."""
        started = time.monotonic()
        budget_bytes = parse_budget(budget, self.keep_all_peak_bytes)
        self._report("choosing what to recompute", 0.5)
        program, solution, simulation = self._solve(budget_bytes)
        self._report("done", 1.0)
        seconds = time.monotonic() - started + self._seconds
        return self._as_plan(program, solution, simulation, budget_bytes, seconds)

    def policy(self, policy: AbstractPolicy) -> Plan:
        """Return the plan that a fixed rule amounts to; see `remat.fit.plan_policy`."""
        started = time.monotonic()
        solution, simulation = self.plain.policy(policy)
        seconds = time.monotonic() - started + self._seconds
        needed = self.plain.needed(simulation)
        return self._as_plan(self.plain, solution, simulation, needed, seconds)

    def frontier(self, points: int) -> list[Plan]:
        """Return the Pareto front; see `remat.frontier`."""
        low, _ = _least(next(self._stages()))
        plans: list[Plan] = []
        for number, budget in enumerate(
            np.linspace(low, max(low, self.keep_all_peak_bytes), points)
        ):
            self._report(f"plan {number + 1} of {points}", number / points)
            made = self.plan(int(budget))
            if not plans or _decisions(made) != _decisions(plans[-1]):
                plans.append(made)
        return plans

    def memory_snapshot(self, plan: Plan) -> dict[str, Any]:
        """Return a plan's step, replayed through the allocator, as a PyTorch memory snapshot."""
        programs = itertools.chain.from_iterable(self._stages() if plan.rewrites else ())
        program = next((p for p in programs if p.rewrites == plan.rewrites), self.plain)
        return program.memory_snapshot(plan.regions)

    # -- programs ---------------------------------------------------------------------------------

    @property
    def rewritten(self) -> tuple[Program, ...]:
        """The programs with loss heads in slices, where these free memory; traced once."""
        if self._rewritten is None:
            self._rewritten = ()
            if self._chunks is not False:
                self._rewritten = with_sliced_heads(self.plain, self._step, self._make)
        return self._rewritten

    @property
    def narrowed(self) -> tuple[Program, ...]:
        """The programs with token-wise modules in slices as well, where these free memory."""
        if self._narrowed is None:
            self._narrowed = ()
            if self._chunks is not False:
                self._narrowed = with_sliced_tokens(
                    self.plain, self.rewritten, self._step, self._make
                )
        return self._narrowed

    @property
    def last_resort(self) -> tuple[Program, ...]:
        """The programs with blocks in slices of the batch, which recompute them all."""
        if self._last_resort is None:
            self._last_resort = ()
            if self._chunks is not False:
                self._last_resort = with_sliced_blocks(
                    self.plain, self.rewritten, self.narrowed, self._step, self._make
                )
        return self._last_resort

    def _stages(self) -> Iterator[tuple[Program, ...]]:
        """Yield programs that compete; the next are only traced where these do not suffice."""
        if self._chunks:
            yield (self.plain, *self.rewritten, *self.narrowed)
        else:
            yield (self.plain,)
            yield self.rewritten
            yield self.narrowed
        yield self.last_resort

    def _solve(self, budget_bytes: int) -> tuple[Program, Solution, Simulation]:
        """Return the program and choice of the least time within a budget; the plain one first.

        Where a program's least peak is the optimizer's, no other is tried: none would be lower.

        Raises
        ------
        BudgetError: if no program that is allowed reaches it.
        """
        tried: list[Program] = []
        for programs in self._stages():
            found = [(program, program.solve(budget_bytes)) for program in programs]
            solved = [(program, *result) for program, result in found if result is not None]
            if solved:
                return min(solved, key=lambda item: _seconds(item[0], item[1]))
            tried += programs
            if any(program.is_at_floor() for program in programs):
                break
        needed, least = _least(tried)
        raise BudgetError(
            budget_bytes,
            needed,
            self.plain.accounting.blame(least),
            host_budget_bytes=self.plain.host_budget_bytes,
        )

    # -- the record -------------------------------------------------------------------------------

    def _as_plan(
        self,
        program: Program,
        solution: Solution,
        simulation: Simulation,
        budget_bytes: int,
        seconds: float,
    ) -> Plan:
        step = self._step
        forward = self.plain.cost.forward_seconds
        recomputed = sum(program.options[p].seconds for p in solution.chosen)
        fraction = recomputed / forward if forward else 0.0
        # What waits on the host need not be recomputed: the bound holds with that much more memory.
        accounting = program.accounting
        allowed = accounting.allowed_bytes(budget_bytes) + (program.host_budget_bytes or 0)
        bound = lower_bound_seconds(program.timeline, program.cost, allowed) / forward
        return Plan(
            fingerprint=fingerprint(
                step.model, step.batch, step.loss, step.optimizer, program.trace.device_type
            ),
            budget_bytes=budget_bytes,
            predicted_peak_bytes=simulation.peak_bytes,
            keep_all_peak_bytes=self.keep_all_peak_bytes,
            forward_seconds=forward,
            step_seconds=self.plain.cost.step_seconds,
            recompute_seconds=solution.seconds,
            recompute_fraction=fraction,
            lower_bound_fraction=min(bound, fraction),
            gap=max(0.0, fraction - bound),
            outcome=solution.outcome if solution.chosen else Outcome.OPTIMAL,
            regions=program.regions(solution.chosen),
            rewrites=program.rewrites,
            hazards=program.hazards,
            breakdown=simulation.breakdown,
            margin_bytes=accounting.margin_bytes(
                simulation.reserved_bytes or simulation.peak_bytes
            ),
            device=program.cost_model.device.name,
            predicted_reserved_bytes=simulation.reserved_bytes,
            outside_bytes=accounting.outside_bytes,
            cost_source=program.cost_model.source,
            step_error_bar=step_error_bar(program.cost_model),
            plan_seconds=seconds,
            host_budget_bytes=program.host_budget_bytes,
            notes=self._notes(program, solution, budget_bytes),
        )

    def _notes(self, program: Program, solution: Solution, budget_bytes: int) -> tuple[str, ...]:
        notes = [*rewrite_notes(program.rewrites), *program.trace.notes]
        if budget_bytes >= self.keep_all_peak_bytes and not solution.chosen:
            notes.append(
                f"The budget of {format_bytes(budget_bytes)} is at or above the keep-everything "
                f"peak of {format_bytes(self.keep_all_peak_bytes)}: nothing is recomputed."
            )
        notes += program.accounting.notes()
        if program.accounting.is_workspace_known and program.workspace:
            notes.append(
                f"Kernels' own workspace was measured here for {len(program.workspace)} op shapes "
                f"(threads: {torch.get_num_threads()}), the largest "
                f"{format_bytes(max(program.workspace.values()))}."
            )
        return tuple(notes)


def _seconds(program: Program, solution: Solution) -> float:
    """Return the estimated time of a step of one program under one choice."""
    return program.cost.step_seconds + solution.seconds


def _least(programs: Iterable[Program]) -> tuple[int, Simulation]:
    """Return the least budget that any of the programs fits, and its simulation."""
    simulated = [(program, program.least_peak()[1]) for program in programs]
    return min(((p.needed(s), s) for p, s in simulated), key=lambda item: item[0])


def _decisions(plan: Plan) -> tuple[tuple[Region, ...], tuple[Rewrite, ...]]:
    return plan.regions, plan.rewrites
