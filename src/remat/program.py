"""Program: one traced training step with its options, its timeline and the search over them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from torch import nn

from remat.cost.devices import Device, find_device
from remat.cost.model import CostModel, cost_step
from remat.cost.usual import usual_cost
from remat.cost.workspace import measure_workspace
from remat.planner.blocks import find_blocks
from remat.planner.dropping import find_drops
from remat.planner.folding import fold
from remat.planner.offload import find_offloads
from remat.planner.options import Option, find_options
from remat.planner.policies import AbstractPolicy, simple_policies
from remat.planner.records import Outcome, Region, Rewrite, RewriteKind
from remat.planner.recursion import find_recursions
from remat.planner.solver import Solution, Solver
from remat.planner.spans import Facts, Span
from remat.planner.tightening import bracket, tighten
from remat.planner.timeline import Timeline
from remat.prove.accounting import Accounting, target_of
from remat.prove.expected import timeline_events
from remat.prove.records import Simulation
from remat.prove.snapshot import memory_snapshot
from remat.regions.apply import has_backward_hooks, host_peak_bytes, install, remove
from remat.regions.fingerprint import device_type_of
from remat.trace.capture import capture
from remat.trace.handover import OptimizerPart
from remat.trace.records import CRUMBS_BYTES, OpSignature, StepTrace
from remat.trace.step import Loss, OptimizerLike
from remat.units import format_bytes, format_seconds

# Any: batches are the user's own types.

_MOST_REPAIRS = 6
# Where what counts is reserved: searches, known choices that are estimated, and those of them that
# are traced; what is estimated may be above what the trace gives by a few percent.
_MOST_TRIED, _MOST_TRACED = 8, 2
_LIKELY = 1.05

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Step:
    """What is trained: everything that a step is traced from."""

    model: nn.Module
    batch: Any
    loss: Loss | None
    optimizer: OptimizerLike


class Program:
    """One trace of a step, from which choices of regions for any number of budgets are made.

    With `rewrites` on the model, the step is another program, with a trace of its own; `like` is
    one of the step without them. With `only_blocks`, blocks are the only options: much less work,
    where no plan is looked for.
    """

    def __init__(
        self,
        step: Step,
        *,
        rewrites: tuple[Rewrite, ...] = (),
        device: Device | str | None,
        cost: CostModel | None,
        time_limit_s: float,
        report: Report,
        trace: StepTrace | None = None,
        like: StepTrace | None = None,
        host_budget_bytes: int | None = None,
        only_blocks: bool = False,
    ) -> None:
        self._step, self._report, self.rewrites = step, report, rewrites
        if cost is None:
            if not isinstance(device, Device):
                device = find_device(device or device_type_of(step.model))
            cost = usual_cost(device)
        self._target = target_of(cost.device, device_type_of(step.model))
        self._report("tracing one training step", 0.0)
        # A trace that is given follows from others; it stands for one of this step.
        self._like = like
        self.trace = trace or self._captured((), drop_saved=True)[0]
        self._like = self.trace if trace is None else like
        sliced = {r.module for r in rewrites if r.kind is RewriteKind.SLICED_CALL}
        self._sliced_starts = [c.start for c in self.trace.calls if c.module in sliced]
        sliced = {r.module for r in rewrites if r.kind is RewriteKind.SLICED_TOKENS}
        self._token_starts = [c.start for c in self.trace.calls if c.module in sliced]
        self._report("pricing ops", 0.3)
        self.workspace, is_workspace_known = self._kernel_workspace(cost.workspace)
        self.accounting = Accounting(
            device=cost.device,
            device_type=self.trace.device_type,
            is_workspace_known=is_workspace_known,
            has_convolutions=any("convolution" in s.name for s in self.trace.signatures),
        )
        self.cost_model = dataclasses.replace(cost, workspace=self.workspace)
        self.cost = cost_step(self.trace, self.cost_model)
        self._modules = dict(step.model.named_modules())
        facts = Facts(self.trace, self.cost)
        blocks = find_blocks(self.trace)
        found = find_options(facts, keep=frozenset(blocks), only_kept=only_blocks)
        options = [option for option in found.options if not self._holds_slices(option)]
        place = {o.parts[0].span: p for p, o in enumerate(options) if o.is_recomputed}
        bare = Timeline(self.trace, self.cost, ())
        chains = [
            [plan for plan in plans if self._may_be_put_on(plan)]
            for plans in (() if only_blocks else find_recursions(facts, bare))
        ]
        for option in chain.from_iterable(chain.from_iterable(chains)):
            if option.parts[0].span not in place:
                place[option.parts[0].span] = len(options)
                options.append(option)
        if not only_blocks:
            options += [option for option in find_drops(facts) if not self._holds_slices(option)]
        self.host_budget_bytes = host_budget_bytes
        if host_budget_bytes is not None:
            options += find_offloads(facts, tuple(options))
        self.options: tuple[Option, ...] = tuple(options)
        self.hazards = found.hazards
        self.timeline = bare.with_options(self.options)
        plans_of = [
            tuple(frozenset(place[o.parts[0].span] for o in plan) for plan in plans)
            for plans in chains
            if plans
        ]
        self.chain_plans = tuple(chain.from_iterable(plans_of))
        self.solver = Solver(
            self.timeline, time_limit_s=time_limit_s, host_budget_bytes=host_budget_bytes,
            folding=fold(self.trace, self.options, blocks, plans_of),
        )  # fmt: skip
        self.blocks = tuple(place[span] for c in blocks if (span := Span((c,))) in place)
        self._keep_all = self.timeline.curve(())
        self._known: list[frozenset[int]] = [
            frozenset(self.blocks[i] for i in policy.choose(len(self.blocks)))
            for policy in simple_policies(len(self.blocks))
        ]
        self._known += self.chain_plans
        self._simulated: dict[frozenset[int], Simulation] = {}
        self._estimated: dict[frozenset[int], int] = {}
        self._least: Solution | None = None
        self._least_reserved: Solution | None = None
        self._keep_all_needed: int | None = None

    @property
    def keep_all_peak_bytes(self) -> int:
        """Peak of the step when nothing is recomputed, counted as a budget is."""
        if not self.accounting.counts_reserved:
            return self._keep_all.peak_bytes
        if self._keep_all_needed is None:
            self._keep_all_needed = self.needed(self.simulate(()))
        return self._keep_all_needed

    def _holds_slices(self, option: Option) -> bool:
        """Whether a call that recomputes its own slices lies inside an option that bars it.

        Slices of the batch lie in no region; slices of tokens run again, as slices, inside one that
        recomputes everything.
        """
        starts = self._sliced_starts + ([] if option.is_recomputed else self._token_starts)
        return any(option.start <= start <= option.end for start in starts)

    def _may_be_put_on(self, plan: tuple[Option, ...]) -> bool:
        return not any(self._holds_slices(option) or self._holds_hooks(option) for option in plan)

    def _holds_hooks(self, option: Option) -> bool:
        """Whether a member of a run has backward hooks, which would fire twice."""
        modules = self._modules
        return any(
            has_backward_hooks(modules[name])
            for region in option.regions()
            if region.followers
            for name in (region.module, *region.followers)
        )

    # -- search -----------------------------------------------------------------------------------

    def solve(self, budget_bytes: int) -> tuple[Solution, Simulation] | None:
        """Return the cheapest choice of which a simulation keeps the budget, and that simulation.

        Returns `None` where even the least peak that is found is above the budget.
        """
        solution = self.cheapest_that_fits(budget_bytes, self._simulated_need)
        if solution is not None:
            self._known.append(solution.chosen)
            return solution, self.simulate(solution.chosen)
        least, simulation = self.least_peak()
        return (least, simulation) if self.needed(simulation) <= budget_bytes else None

    def cheapest_that_fits(
        self, budget_bytes: int, needed: Callable[[frozenset[int]], int]
    ) -> Solution | None:
        """Return the cheapest choice that is found to need no more than a budget.

        What a choice needs, `needed` says; a search knows what it requests. On CUDA the two are
        not in order, and the known choices are tried as well.
        """

        def excess(chosen: frozenset[int]) -> int:
            return needed(chosen) - budget_bytes

        allowed = self.accounting.allowed_bytes(budget_bytes)
        remaining = self.solver.deadline()
        reserves = self.accounting.counts_reserved
        search = functools.partial(self.cheapest, remaining=remaining, roughly=reserves)
        if not reserves:
            return tighten(search, excess, allowed, tries=_MOST_REPAIRS)
        found = bracket(search, excess, allowed, tries=_MOST_TRIED)
        return self._known_that_fits(allowed, excess, found) or found

    def _known_that_fits(
        self, allowed: int, excess: Callable[[frozenset[int]], int], best: Solution | None
    ) -> Solution | None:
        """Return the first known choice, from the cheapest, that fits and is cheaper than one."""
        most = best.seconds if best is not None else math.inf
        cheaper = sorted(
            (seconds, least, sorted(chosen))
            for chosen, least in self._least_bytes().items()
            if least <= allowed and (seconds := self.solver.cost(chosen)) < most
        )
        traced = 0
        for *_, positions in cheaper[:_MOST_TRIED]:
            chosen = frozenset(positions)
            likely = self.accounting.allowed_bytes(self.estimated(chosen)) <= allowed * _LIKELY
            if likely and traced < _MOST_TRACED:
                traced += 1
                if excess(chosen) <= 0:
                    return self.solver.measured(chosen)
        return None

    def _least_bytes(self) -> dict[frozenset[int], int]:
        """Bound from below what each known choice requests."""
        ticks = [tick for tick, _ in self.solver.violations(self._keep_all, 0)]
        return {chosen: self.solver.least_bytes(chosen, ticks) for chosen in self._known}

    def least_peak(self) -> tuple[Solution, Simulation]:
        """Return the choice that needs the least, of those that are found, and its simulation."""
        least = self.least_choice()
        if self.accounting.counts_reserved and self._least_reserved is None:
            lowest = sorted((size, sorted(c)) for c, size in self._least_bytes().items())
            tried = {frozenset(c) for _, c in lowest[:_MOST_TRIED]} | {frozenset(self.blocks)}
            likely = sorted(tried, key=lambda c: (self.estimated(c), sorted(c)))[:_MOST_TRACED]
            found = min({least.chosen, *likely}, key=lambda c: (self._simulated_need(c), sorted(c)))
            same = found == least.chosen
            self._least_reserved = least if same else self.solver.measured(found)
        least = self._least_reserved or least
        return least, self.simulate(least.chosen)

    def least_choice(self) -> Solution:
        """Return the choice of the least peak by the timeline; it is looked for once."""
        if self._least is None:
            self._report("looking for the least peak", 0.7)
            self._least = self.solver.least_peak(self._known)
        return self._least

    def is_at_floor(self) -> bool:
        """Whether the least peak is the optimizer's, which no plan and no rewrite changes.

        What is reserved may still become less.
        """
        part = OptimizerPart.of(self.trace)
        if part is None or self.accounting.counts_reserved:
            return False
        floor = part.least_peak_bytes(self.cost.op_workspace)
        # Crumbs are there beside it, and scalars such as the loss take no more.
        return self.least_peak()[1].peak_bytes <= floor + 2 * CRUMBS_BYTES

    def policy(self, policy: AbstractPolicy) -> tuple[Solution, Simulation]:
        """Return the choice that a fixed rule amounts to, and its simulation."""
        chosen = frozenset(self.blocks[i] for i in policy.choose(len(self.blocks)))
        solution = Solution(
            chosen=chosen, seconds=self.solver.cost(chosen), peak_bytes=0,
            outcome=Outcome.FEASIBLE, bound_seconds=0.0, num_rows=0, num_solves=0,
        )  # fmt: skip
        return solution, self.simulate(chosen)

    def cheapest(
        self,
        allowed: int,
        *,
        remaining: Callable[[], float] | None = None,
        roughly: bool = False,
    ) -> Solution | None:
        """Return the cheapest choice whose timeline keeps so many bytes, `None` if none does.

        To one percent where that is enough: what is unused between blocks moves budgets by more.
        """
        self._report("choosing what to recompute", 0.6)
        known = [*self._known, *([self._least.chosen] if self._least is not None else [])]
        return self.solver.cheapest(allowed, known, remaining=remaining, roughly=roughly)

    # -- simulation -------------------------------------------------------------------------------

    def simulate(self, chosen: Iterable[int]) -> Simulation:
        """Run the step under fake tensors with the choice applied; once for each choice.

        It takes longer than most searches, and neighbouring budgets often have the same plan.
        """
        self._report("simulating the plan", 0.8)
        chosen = frozenset(chosen)
        if chosen not in self._simulated:
            regions = tuple(r for p in sorted(chosen) for r in self.options[p].regions())
            trace, host_bytes = self._captured(regions, drop_saved=False)
            self._simulated[chosen] = self.accounting.simulation(
                trace, self._workspace_of(trace.signatures), host_bytes
            )
        return self._simulated[chosen]

    def memory_snapshot(self, regions: tuple[Region, ...]) -> dict[str, Any]:
        """Return the step under regions as a PyTorch memory snapshot, by the allocator's model."""
        trace, _ = self._captured(regions, drop_saved=False)
        return memory_snapshot(
            trace,
            self.accounting.options,
            workspace=self._workspace_of(trace.signatures),
            library_bytes=self.accounting.library_bytes,
        )

    def _captured(self, regions: tuple[Region, ...], *, drop_saved: bool) -> tuple[StepTrace, int]:
        """Trace the step under regions; return the host memory that they take as well."""
        step = self._step
        install(step.model, regions, self.rewrites)
        try:
            trace = capture(
                step.model, step.batch, loss=step.loss, optimizer=step.optimizer,
                drop_saved=drop_saved, target=self._target, like=self._like,
            )  # fmt: skip
            return trace, host_peak_bytes(step.model)
        finally:
            remove(step.model)

    def needed(self, simulation: Simulation) -> int:
        """Return the least budget that a simulated plan fits, its margin included."""
        return self.accounting.needed_bytes(simulation)

    def _simulated_need(self, chosen: frozenset[int]) -> int:
        return self.needed(self.simulate(chosen))

    def estimated(self, chosen: Iterable[int]) -> int:
        """Return the least budget that fits a choice, from the timeline, without another trace.

        What a simulation gives where nothing is recomputed; with regions, the working set of a
        recomputation is taken as one block.
        """
        chosen = frozenset(chosen)
        if not self.accounting.counts_reserved:
            return self.accounting.needed_for(self.timeline.curve(chosen).peak_bytes)
        if chosen not in self._estimated:
            events = timeline_events(self.timeline, chosen)
            peaks = self.accounting.peaks(self.trace, events=events)
            self._estimated[chosen] = self.accounting.needed_for(peaks.reserved_bytes)
        return self._estimated[chosen]

    def _kernel_workspace(
        self, given: Mapping[OpSignature, int] | None
    ) -> tuple[dict[OpSignature, int], bool]:
        self._given_workspace = given
        if given is not None:
            return dict(given), True
        if self.trace.device_type != "cpu":
            return {}, False
        return dict(measure_workspace(self.trace.signatures)), True

    def _workspace_of(self, signatures: Iterable[OpSignature]) -> dict[OpSignature, int]:
        if self._given_workspace is not None:
            return dict(self._given_workspace)
        return dict(measure_workspace(signatures)) if self.accounting.is_workspace_known else {}

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
            how = "recomputed" if option.is_recomputed else "offloaded"
            region = option.parts[0].region
            if region.dropped_ops:
                how = f"{len(region.dropped_ops)} of its ops run again"
            if region.packed_ops:
                packed = f"packed results take {format_bytes(region.packed_bytes)}"
                how = f"{how}, {packed}" if region.dropped_ops else packed
            moved = f"{format_bytes(option.host_bytes)} on the host, " if option.host_bytes else ""
            offload = region.offload
            if offload is not None and offload.prefetch is not None:
                moved += f"fetched from {offload.prefetch.module or 'the loss'} on, "
            reason = (
                f"{how}: frees {format_bytes(freed)} at the peak, {moved}"
                f"costs {format_seconds(seconds)}"
            )
            outer, *nested = option.regions()
            figures = {"freed_bytes": freed, "recompute_seconds": seconds, "reason": reason}
            inner = {"reason": "recomputed once more, inside the region around it"}
            regions += [
                outer.model_copy(update=figures),
                *(r.model_copy(update=inner) for r in nested),
            ]
        return tuple(regions)
