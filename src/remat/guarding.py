"""Guard: a plan held to its promise while training runs, and tightened once if memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from remat.errors import ApplyError, BudgetError
from remat.fit import plan as make_plan
from remat.planner.records import Plan
from remat.prove.allocator import record_peak, step_tensors
from remat.prove.measure import check_real
from remat.prove.records import GuardEvent
from remat.regions.apply import Handle, apply
from remat.regions.guards import all_modules
from remat.replacing import replace_checkpointing
from remat.trace.standin import random_states, restore_random_states
from remat.trace.step import Loss
from remat.units import format_bytes

# Any: batches are the user's own types.

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# The error that predictions are held to, relative to the measured peak, and bytes below which no
# difference is worth a word.
STATED_ERROR = {"cpu": 0.01, "cuda": 0.02}
SMALL_BYTES = 64 * 1024
# How much of the peak a plan gives up when memory has run out under it.
_TIGHTER = 0.9


class Guard:
    """A plan on a model, watched: see `guard`."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        plan: Plan,
        *,
        loss: Loss | None,
        optimizer: torch.optim.Optimizer | None,
        steps: int,
    ) -> None:
        self._device = check_real(model, batch)
        self._model, self._batch = model, batch
        self._loss, self._optimizer = loss, optimizer
        self._number = 0
        self._measured = range(1, 1 + steps)  # the first step makes the optimizer's state
        self._may_tighten = True
        self.plan = plan
        self.events: tuple[GuardEvent, ...] = ()
        self._handle: Handle = apply(model, plan)

    def step(self, run: Callable[[], _T]) -> _T:
        """Run one whole training step, measured in the first steps; return what it returns.

        `run` begins with `optimizer.zero_grad()`, as it may be called a second time.

        Raises
        ------
        torch.OutOfMemoryError: if memory runs out a second time, no tighter plan is left, or the
            step had begun to write to parameters.
        """
        number = self._number
        self._number += 1
        states = random_states()
        modules = all_modules((self._model,))
        buffers = [
            (b, b.detach().clone()) for m in modules for b in m._buffers.values() if b is not None
        ]
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        versions = [p._version for p in parameters]
        try:
            return self._run(run, number)
        except torch.OutOfMemoryError as error:
            can_repeat = versions == [p._version for p in parameters]
            if not (self._may_tighten and can_repeat):
                raise
            error.__traceback__ = None  # its frames hold the step's tensors
        self._model.zero_grad(set_to_none=True)
        self._tighten(number)
        restore_random_states(states)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return self._run(run, number)

    def remove(self) -> None:
        """Take the plan off the model."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _run(self, run: Callable[[], _T], number: int) -> _T:
        if number not in self._measured:
            return run()
        results: list[_T] = []
        self._model.zero_grad(set_to_none=True)  # the record would see these freed, not held
        alive: list[Tensor] = step_tensors(self._model, self._batch, self._optimizer)
        peak = record_peak(lambda: results.append(run()), alive, self._device).peak_bytes
        predicted, budget = self.plan.predicted_peak_bytes, self.plan.budget_bytes
        share = STATED_ERROR.get(self._device.type, STATED_ERROR["cuda"])
        allowed = max(share * predicted + self.plan.margin_bytes, SMALL_BYTES)
        if abs(peak - predicted) > allowed or peak > budget:
            message = (
                f"step {number} took {format_bytes(peak)} at its peak, {peak - predicted:+d} bytes "
                f"from the predicted {format_bytes(predicted)}; the budget is "
                f"{format_bytes(budget)}. Does the step work on the batch, loss and optimizer that "
                "were planned?"
            )
            self._note(
                GuardEvent(
                    kind="drift", step=number, predicted_peak_bytes=predicted,
                    measured_peak_bytes=peak, budget_bytes=budget, message=message,
                )
            )  # fmt: skip
        return results[0]

    def _tighten(self, number: int) -> None:
        """Put a plan with a lower peak on; once."""
        before = self.plan
        self._may_tighten = False
        self._handle.remove()
        wanted = int(before.predicted_peak_bytes * _TIGHTER)
        try:
            made = self._planned(wanted)
        except BudgetError as error:
            made = self._planned(error.minimum_bytes)
        if made.predicted_peak_bytes >= before.predicted_peak_bytes:
            self._handle = apply(self._model, before)
            raise torch.OutOfMemoryError(
                "memory ran out in a step under a plan, and no plan has a lower peak than "
                f"{format_bytes(before.predicted_peak_bytes)}: a smaller batch is needed."
            )
        self.plan, self._handle = made, apply(self._model, made)
        self._note(
            GuardEvent(
                kind="tightened", step=number, predicted_peak_bytes=made.predicted_peak_bytes,
                measured_peak_bytes=None, budget_bytes=made.budget_bytes,
                message=f"memory ran out in step {number}: the plan was tightened from "
                f"{format_bytes(before.predicted_peak_bytes)} to "
                f"{format_bytes(made.predicted_peak_bytes)} and the step repeated",
            )
        )  # fmt: skip

    def _planned(self, budget_bytes: int) -> Plan:
        step: dict[str, Any] = {"loss": self._loss, "optimizer": self._optimizer}
        if self.plan.replaces_checkpointing:
            return replace_checkpointing(self._model, self._batch, budget_bytes, **step)
        chunks = None if self.plan.rewrites else False  # a plan that gives the same bits stays so
        return make_plan(self._model, self._batch, budget_bytes, chunks=chunks, **step)

    def _note(self, event: GuardEvent) -> None:
        _log.warning("%s", event.message)
        self.events = (*self.events, event)


def guard(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 2,
) -> Guard:
    """Apply a plan and hold it to its promise while you train.

    The `steps` steps after the first are measured by the allocator's record; a peak further from
    the prediction than 1% (CPU) or 2% (CUDA) and the plan's margin, or above the budget, is
    logged as a warning and kept in `.events`. Where memory runs out, once, a plan with a tenth less
    is made and the step is repeated from the same random state and buffers. Later steps cost a copy
    of the random state and of the buffers.

    Arguments
    ---------
    batch, loss: as the plan was made for; a tighter plan is made for the same.
    optimizer: the one that steps, whose state is part of the peak.

    Raises
    ------
    ApplyError, PlanMismatchError: as `remat.apply`.
    WorkloadError: if model or batch has no values.

    Example
    -------
    ```python
    with remat.guard(model, batch, plan, loss=loss_fn, optimizer=optimizer) as guard:
        for batch in data:
            value = guard.step(lambda: train_step(batch))
    ```
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ApplyError(f"steps must be an integer >= 0, got {steps!r}.")
    return Guard(model, batch, plan, loss=loss, optimizer=optimizer, steps=steps)
