"""Adapt: one plan for each bucket of shapes, put on before the forward of each batch."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from remat.adapting.around import Surrounded, Surroundings
from remat.adapting.gate import Gate
from remat.adapting.shapes import (
    Buckets,
    Shapes,
    Variation,
    describe,
    enlarged,
    is_within,
    shapes_of,
    structure_of,
)
from remat.errors import ApplyError, BudgetError, CaptureError, RematError, WorkloadError
from remat.fit import Fit
from remat.planner.records import Plan
from remat.prove.simulate import simulate
from remat.regions.apply import install, is_applied, remove
from remat.regions.fingerprint import batch_signature
from remat.trace.records import OPTIMIZER_STATE
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike, check_model, loss_in
from remat.units import format_seconds, parse_budget

# Any: batches, and a model's arguments, are the user's own types.

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One plan that was made while training ran: for which shapes, and what it took to find.

    `shapes` are those of the batch that it was made for, which may be larger than any that came.
    """

    shapes: Shapes
    plan: Plan
    seconds: float

    @property
    def is_free(self) -> bool:
        """Whether the plan recomputes nothing."""
        return not (self.plan.regions or self.plan.rewrites)

    @property
    def message(self) -> str:
        """Say in one line what was done."""
        return (
            f"planned batches up to {describe(self.shapes)} in {format_seconds(self.seconds)}: "
            f"{self.plan.summary()}"
        )


@dataclass(frozen=True, slots=True)
class _Key:
    """What a plan holds for, exactly: shapes, modes, and which parameters are trained."""

    structure: object
    shapes: Shapes
    state: object


class Adaptive:
    """A model under the plan that fits the batch at hand: see `adapt`."""

    def __init__(
        self,
        model: nn.Module,
        budget: int | str,
        *,
        loss: Loss | None,
        optimizer: OptimizerLike,
        buckets: Sequence[int] | None,
        chunks: bool | None,
        most_plans: int,
        around: Surroundings,
        on_planned: Callable[[Planned], None] | None = None,
    ) -> None:
        check_model(model)
        if is_applied(model):
            raise ApplyError("a plan is on this model: call handle.remove() before adapting it.")
        if isinstance(most_plans, bool) or not isinstance(most_plans, int) or most_plans < 1:
            raise WorkloadError(f"most_plans must be an integer >= 1, got {most_plans!r}.")
        if not (isinstance(budget, str) and budget.strip().endswith("%")):
            parse_budget(budget)
        self._model, self._budget = model, budget
        self._optimizer, self._chunks, self._most_plans = optimizer, chunks, most_plans
        self._variation = Variation(Buckets(buckets))
        self._gate = Gate(self._choose) if loss is None else None
        self._loss = Surrounded(_loss_of_call if loss is None else loss, around)
        self._plans: OrderedDict[_Key, Planned] = OrderedDict()
        self._served: dict[_Key, _Key] = {}  # an exact shape -> the one that was planned
        self._on: Planned | None = None
        self._is_removed = False
        self._simulating_s = 0.0
        self._on_planned = on_planned
        self.history: tuple[Planned, ...] = ()
        if self._gate is not None:
            self._gate.put_on(model)

    # -- what the user calls ----------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The plan that is on the model now."""
        return None if self._on is None else self._on.plan

    @property
    def planning_seconds(self) -> float:
        """Time that planning, and simulating shapes under plans, has taken so far."""
        return sum(planned.seconds for planned in self.history) + self._simulating_s

    def prepare(self, batch: Any) -> Plan:
        """Put the plan for a batch on the model, made now if there is none that serves it.

        Needed where `loss` was given: before each forward. Costs a comparison of shapes where the
        batch has a shape that was seen before.

        Raises
        ------
        BudgetError: if no plan keeps a step on this batch within the budget.
        WorkloadError, CaptureError: as `remat.plan`.
        ApplyError: after `remove`.
        """
        if self._is_removed:
            raise ApplyError("this handle was removed: call remat.adapt again.")
        key = self._key(batch)
        chosen = self._served.get(key)
        if chosen is None:
            chosen = self._served[key] = self._find(key, batch)
        self._plans.move_to_end(chosen)
        self._put_on(self._plans[chosen])
        return self._plans[chosen].plan

    def remove(self) -> None:
        """Take the plan off the model, which is as it was; may be called again."""
        if not self._is_removed:
            self._is_removed = True
            self._take_off()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        on = "no plan yet" if self._on is None else self._on.plan.summary()
        return f"<remat.Adaptive: {len(self._plans)} plans; {on}>"

    # -- which plan -------------------------------------------------------------------------------

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.prepare((args, kwargs))

    def _key(self, batch: Any) -> _Key:
        signature = batch_signature(batch)
        parameters = tuple(self._model.parameters())
        device = parameters[0].device.type if parameters else "cpu"
        autocast = (
            torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device)
        )
        trained = tuple(p.requires_grad for p in parameters)
        state = (self._model.training, autocast, trained)
        return _Key(structure_of(signature), shapes_of(signature), state)

    def _find(self, key: _Key, batch: Any) -> _Key:
        """Return the key of a plan that serves a batch of a new shape; make it if need be."""
        bucket = self._variation.bucket(batch_signature(batch))
        for other, planned in reversed(self._plans.items()):
            alike = (other.structure, other.state) == (key.structure, key.state)
            if not (alike and is_within(key.shapes, other.shapes)):
                continue
            # A plan that costs no time is the best for any smaller shape, whatever its bucket.
            may_serve = planned.is_free or is_within(other.shapes, bucket)
            if other == key or (may_serve and self._serves(planned, batch)):
                return other
        rounded = _Key(key.structure, bucket, key.state)
        if rounded != key and rounded not in self._plans:
            try:
                self._make(rounded, enlarged(batch, bucket))
            except (BudgetError, WorkloadError, CaptureError) as error:
                _log.info("no plan for %s, so for the exact shape: %s", describe(bucket), error)
            else:
                if self._serves(self._plans[rounded], batch):
                    return rounded
        self._make(key, batch)
        return key

    def _serves(self, planned: Planned, batch: Any) -> bool:
        """Whether a batch takes no more memory under a plan than was planned.

        See NOTE [ A bucket ]. The optimizer's step is that of any batch: only its state counts.
        """
        plan, started = planned.plan, time.monotonic()
        with self._bare():
            try:
                simulation = simulate(self._model, batch, plan, loss=self._loss, optimizer=None)
            except RematError as error:
                _log.info("the plan for %s: %s", describe(planned.shapes), error)
                return False
            finally:
                self._loss.release()
        self._simulating_s += time.monotonic() - started
        state_bytes = plan.breakdown.get(OPTIMIZER_STATE, 0)
        return simulation.peak_bytes + state_bytes <= plan.predicted_peak_bytes

    def _make(self, key: _Key, batch: Any) -> None:
        """Plan for a batch, and drop the plan that was used longest ago where there are many."""
        started = time.monotonic()
        with self._bare():
            try:
                fit = Fit(
                    self._model, batch, loss=self._loss, optimizer=self._optimizer,
                    chunks=self._chunks,
                )  # fmt: skip
                # A percentage is of the first batch's peak.
                self._budget = parse_budget(self._budget, fit.keep_all_peak_bytes)
                plan = fit.plan(self._budget)
            except BudgetError as error:
                error.args = (f"{error} The batch is {describe(key.shapes)}.",)
                raise
            finally:
                self._loss.release()
        made = Planned(shapes=key.shapes, plan=plan, seconds=time.monotonic() - started)
        _log.info("%s", made.message)
        self.history = (*self.history, made)
        self._plans[key] = made
        if self._on_planned is not None:
            self._on_planned(made)
        while len(self._plans) > self._most_plans:
            dropped, _ = self._plans.popitem(last=False)
            self._served = {k: v for k, v in self._served.items() if v != dropped}

    # -- on the model -----------------------------------------------------------------------------

    def _put_on(self, planned: Planned) -> None:
        if planned is not self._on:
            with self._bare():
                self._on = planned

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        """Take gate and plan off; then put on what is to be on."""
        self._take_off()
        try:
            yield
        finally:
            if self._on is not None:  # made for this very model: nothing to compare
                install(self._model, self._on.plan.regions, self._on.plan.rewrites)
            if self._gate is not None:
                self._gate.put_on(self._model)

    def _take_off(self) -> None:
        if self._gate is not None:
            self._gate.take_off(self._model)
        remove(self._model)


def _loss_of_call(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    return loss_in(model(*args, **kwargs))


def adapt(
    model: nn.Module,
    budget: int | str,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    buckets: Sequence[int] | None = None,
    accumulates: bool = False,
    chunks: bool | None = None,
    most_plans: int = 16,
) -> Adaptive:
    """Keep every step within a budget while shapes change: one plan for each bucket of shapes.

    Without `loss`, the model returns its own, and nothing in the training loop changes: before each
    forward that records gradients, the plan for its arguments is put on. With `loss`, call
    `handle.prepare(batch)` before each forward. A shape that is new is planned for then, within the
    same budget; where it cannot be met, the forward does not run.

    Sizes that change from batch to batch are rounded up to `buckets`, and the plan for the rounded
    shape serves all in the bucket: nothing is padded, and each new shape is first simulated under
    the plan, and planned for exactly where it would take more. The plan also follows training mode,
    autocast, and which parameters are trained.

    Arguments
    ---------
    budget: as for `remat.plan`; a percentage is of the keep-everything peak of the first batch.
    optimizer: the one that steps; build it before, so that its state is counted as it is.
    buckets: sizes to round up to, for example `(128, 256, 512)`; by default eighths between powers
        of two, which is at most 13% more. `()` plans for every shape exactly.
    accumulates: gradients of earlier micro-steps are there when a step begins.
    chunks: as for `remat.plan`.
    most_plans: plans that are kept; the one that was used longest ago is dropped.

    Raises
    ------
    BudgetFormatError: if the budget cannot be read.
    WorkloadError: for what is no model, bucket or number of plans.
    ApplyError: if a plan is on the model already.
    BudgetError: later, by `prepare` or the forward, if no plan keeps a batch within the budget.

    Example
    -------
    ```python
    handle = remat.adapt(model, "8GiB", optimizer=optimizer)
    for batch in data:  # of any lengths
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    ```
    """
    return Adaptive(
        model, budget, loss=loss, optimizer=optimizer, buckets=buckets, chunks=chunks,
        most_plans=most_plans, around=Surroundings(keeps_gradients=accumulates),
    )  # fmt: skip
