"""Plans in a loop that Accelerate prepares: every step of its training within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from torch import nn
from typing_extensions import Self

from remat.adapting.adapt import Adaptive, Planned
from remat.adapting.around import Surroundings
from remat.errors import ApplyError, MissingPackageError
from remat.integrations.reports import (
    SWITCHED_OFF,
    LibraryCheckpointing,
    figures,
    unplanned_accumulation,
)
from remat.planner.records import Plan
from remat.trace.step import Loss

try:
    from accelerate import Accelerator
    from accelerate.logging import get_logger
    from accelerate.utils import DistributedType
except ImportError as error:
    raise MissingPackageError(
        "accelerate", "integrations", "remat.integrations.accelerate"
    ) from error

# Any: prepared optimizers and batches are of the library's and the user's own types.

_log = get_logger(__name__)

_MOST_PLANS: Final = 16


class RematContext:
    """What `prepare` returns; see there. Leaving it takes the plan off."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, adaptive: Adaptive) -> None:
        self._adaptive = adaptive
        self._accelerator = accelerator
        self._library = LibraryCheckpointing()
        num_off = self._library.switch_off(model)
        if num_off:
            _log.warning(SWITCHED_OFF, num_off)

    @property
    def history(self) -> tuple[Planned, ...]:
        """Every plan that was made."""
        return self._adaptive.history

    @property
    def plan(self) -> Plan | None:
        """The plan that is on the model now."""
        return self._adaptive.plan

    def prepare(self, batch: Any) -> Plan:
        """Put the plan for a batch on: before each forward, where `loss` was given."""
        return self._adaptive.prepare(batch)

    def remove(self) -> None:
        """Leave the model as it was; may be called again."""
        self._adaptive.remove()
        self._library.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    *,
    budget: int | str,
    loss: Loss | None = None,
    buckets: Sequence[int] | None = None,
    chunks: bool | None = None,
) -> RematContext:
    """Keep the steps of a prepared model and optimizer within a budget, inside a `with` block.

    Plans on the first batch, with the accelerator's precision and gradient accumulation, and again
    where shapes change. Without `loss`, the model returns its own and the loop stays as it is; with
    `loss`, call `.prepare(batch)` before each forward. What was decided goes to Accelerate's logger
    and trackers.

    Arguments
    ---------
    model, optimizer: what `accelerator.prepare` returned.
    budget, loss, buckets, chunks: as for `remat.adapt`.

    Raises
    ------
    ApplyError: for DeepSpeed, FSDP1 and Megatron, for FSDP2 where micro-steps leave gradients
        unreduced, or a model that has not been prepared.
    BudgetError: later, if a step on some batch cannot be kept within the budget.

    Example
    -------
    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with prepare(accelerator, model, optimizer, budget="8GiB"):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    ```
    """
    _check_prepared(accelerator, model)
    bare = accelerator.unwrap_model(model)
    # Of DDP the wrapper is planned, whose buckets are in the budget.
    subject = model if isinstance(model, nn.parallel.DistributedDataParallel) else bare

    def report(planned: Planned) -> None:
        _log.info(planned.message)
        accelerator.log(figures(planned))

    adaptive = Adaptive(
        subject,
        budget,
        loss=loss,
        optimizer=getattr(optimizer, "optimizer", optimizer),
        buckets=buckets,
        chunks=chunks,
        most_plans=_MOST_PLANS,
        # The loader is one batch ahead.
        around=Surroundings(
            keeps_gradients=accelerator.gradient_accumulation_steps > 1, spare_batches=1
        ),
        on_planned=report,
    )
    return RematContext(accelerator, bare, adaptive)


def _check_prepared(accelerator: Accelerator, model: nn.Module) -> None:
    kind = accelerator.distributed_type
    allowed = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    reason = None
    if kind == DistributedType.FSDP and accelerator.is_fsdp2:
        if accelerator.gradient_accumulation_steps > 1:
            reason = unplanned_accumulation(model, accelerator)
    elif kind == DistributedType.FSDP:
        reason = "FSDP1, whose flat parameters are not planned: set fsdp_version=2"
    elif kind not in allowed:
        reason = f"{kind.value}, whose gathered parameters are not in the budget"
    if reason is not None:
        raise ApplyError(f"remat does not go with {reason}; see docs/integrations.md.")
    inside = accelerator.unwrap_model(model)
    if not any(accelerator.unwrap_model(known) is inside for known in accelerator._models):
        raise ApplyError(
            "the model has not been prepared: call accelerator.prepare(model, optimizer, ...) "
            "first, and pass what it returns."
        )
