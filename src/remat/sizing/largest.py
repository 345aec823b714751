"""`remat.largest_batch`: the largest batch within a budget, by planning and not by crashing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from remat.cost.devices import Device, find_device
from remat.errors import BudgetError
from remat.files import Record
from remat.fit import Fit
from remat.planner.records import Plan
from remat.prove.measure import has_values, measure
from remat.prove.records import Measurement
from remat.regions.apply import apply
from remat.regions.fingerprint import device_type_of
from remat.sizing.records import Mode
from remat.sizing.survey import Sizer, Subject
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike, check_model
from remat.units import parse_budget

# Any: batches are the user's own types.


class LargestBatch(Record):
    """The most examples of one step within a budget, the plan for them, and one real step."""

    batch_size: int
    plan: Plan
    measurement: Measurement | None = None


def largest_batch(
    model: nn.Module,
    make_batch: Callable[[int], Any],
    budget: int | str,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    device: Device | str | None = None,
    confirm: bool | None = None,
) -> LargestBatch:
    """Find the largest batch whose training step a plan keeps within a budget, and that plan.

    Steps of two small batches are traced, from which those of any batch follow; the largest is
    planned as `remat.plan` would without slices, so that gradients stay the same bit for bit, and
    made smaller where that finds it too large.

    Arguments
    ---------
    make_batch: from a number of examples to a batch, real or on meta.
    budget: total peak of one training step, as bytes or `"8GiB"`; see `remat.plan`.
    device: as for `remat.plan`.
    confirm: run a real step under the plan as well, where the model is, and return its record; by
        default where model and batch have values and it was planned for the device they are on.

    Raises
    ------
    BudgetFormatError: if the budget cannot be read, or is a percentage.
    BudgetError: if not even a batch of one fits.
    WorkloadError, CaptureError: if model, batch, loss or optimizer make no step that can be traced.

    Example
    -------
    ```python
    found = remat.largest_batch(model, lambda n: torch.zeros(n, 3, 224, 224), budget="8GiB")
    handle = remat.apply(model, found.plan)
    ```
    """
    check_model(model)
    budget_bytes = parse_budget(budget)
    row = device if isinstance(device, Device) else find_device(device or device_type_of(model))
    subject = Subject(
        name=type(model).__name__, model=model, make_batch=make_batch, asked=1, loss=loss,
        optimizer=optimizer,
    )  # fmt: skip
    size = max(1, Sizer(subject, row, budget_bytes).largest(Mode.PLANNED))

    def planned(number: int) -> Plan:
        return Fit(
            model, make_batch(number), loss=loss, optimizer=optimizer, device=row,
            chunks=False,
        ).plan(budget_bytes)  # fmt: skip

    while True:
        try:
            plan = planned(size)
            break
        except BudgetError:
            if size == 1:
                raise
            size -= max(1, size // 50)
    measurement, batch = None, make_batch(size)
    if confirm is None:
        confirm = row.torch_type == device_type_of(model) and has_values(model, batch)
    if confirm:
        with apply(model, plan):
            measurement = measure(model, batch, loss=loss, optimizer=optimizer, steps=1)
    return LargestBatch(batch_size=size, plan=plan, measurement=measurement)
