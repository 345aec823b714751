"""Replace: a plan in the place of the checkpointing that a model's author wrote."""

from __future__ import annotations

from typing import Any

from torch import nn

from remat.errors import BudgetError
from remat.fit import Fit, Progress
from remat.planner.records import Plan
from remat.prove.simulate import simulate
from remat.trace.checkpoints import checkpointing_off
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike

# Any: batches are the user's own types.


def replace_checkpointing(
    model: nn.Module,
    batch: Any,
    budget: int | str | None = None,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    time_limit_s: float = 8.0,
    progress: Progress | None = None,
) -> Plan:
    """Plan as if the model did not checkpoint; applied, the plan takes that checkpointing's place.

    The model's code and switches stay as they are: while the plan is on, its own calls of torch's
    checkpoint run plainly, and after `handle.remove()` they checkpoint again. A percentage is of
    the peak without any checkpointing. Nothing runs in slices: the bits are those of the model.

    Arguments
    ---------
    budget: as for `remat.plan`; by default the peak that the model's own checkpointing reaches,
        which a plan mostly reaches at less cost. Where it is out of reach, as a model that
        recomputes wrongly may need less, the least peak that is in reach.

    Raises
    ------
    BudgetError: if no plan stays within the budget that was given.
    WorkloadError, CaptureError: as `remat.plan`; by default also if the step fails as it stands.
    """
    step: dict[str, Any] = {"loss": loss, "optimizer": optimizer}
    wanted = budget if budget is not None else simulate(model, batch, **step).peak_bytes
    with checkpointing_off():
        fit = Fit(model, batch, chunks=False, time_limit_s=time_limit_s, progress=progress, **step)
        try:
            made = fit.plan(wanted)
        except BudgetError as error:
            if budget is not None:
                raise
            made = fit.plan(error.minimum_bytes)
    note = "The model's own checkpointing runs plainly while this plan is on."
    return made.model_copy(update={"replaces_checkpointing": True, "notes": (*made.notes, note)})
