"""A callback for Transformers' Trainer: every step of its training within a budget.

NOTE [ Which trainer ]
The Trainer tells its callbacks everything but itself, and what is to be planned is its own step:
its `compute_loss`, which people override, its optimizer and its precision. So the trainer is looked
up among the callers of the first event: the one whose list of callbacks has this callback in it.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from remat.adapting.adapt import Adaptive, Planned
from remat.adapting.around import Surroundings
from remat.errors import ApplyError, MissingPackageError
from remat.integrations.reports import (
    SWITCHED_OFF,
    LibraryCheckpointing,
    figures,
    unplanned_accumulation,
)
from remat.units import parse_budget

try:
    from transformers import Trainer, TrainerCallback
    from transformers.utils import logging
except ImportError as error:
    raise MissingPackageError(
        "transformers", "integrations", "remat.integrations.transformers"
    ) from error

# Any: inputs are whatever the collator makes, events carry whatever the Trainer passes.

_log = logging.get_logger("transformers.remat")


class RematCallback(TrainerCallback):
    """Plan on the first batch, and again where shapes change; take the plan off at the end.

    The step that is planned is the trainer's own, with its loss, optimizer, precision and gradient
    accumulation. What was decided is logged by the trainer (`remat/predicted_peak_bytes` and others
    in its metrics). Gradient checkpointing that the arguments or the model ask for is switched off
    meanwhile. The model is as it was at the end, also after an exception; if the callback was added
    by `trainer.add_callback`, an exception outside of the step leaves that to `remove()`.

    Arguments
    ---------
    budget, buckets, chunks: as for `remat.adapt`. A percentage is of the first batch's peak.

    Raises
    ------
    BudgetError: by `trainer.train()`, if a step on some batch cannot be kept within the budget.
    ApplyError: by `trainer.train()`, for DataParallel, DeepSpeed and FSDP1, and for FSDP2 where
        micro-steps leave gradients unreduced.

    Example
    -------
    ```python
    trainer = Trainer(model, args, train_dataset=data, callbacks=[RematCallback(budget="8GiB")])
    trainer.train()
    ```
    """

    def __init__(
        self,
        budget: int | str,
        *,
        buckets: Sequence[int] | None = None,
        chunks: bool | None = None,
    ) -> None:
        parse_budget(budget, keep_all_peak_bytes=1 << 40)  # what cannot be read is said here
        self._budget, self._buckets, self._chunks = budget, buckets, chunks
        self._adaptive: Adaptive | None = None
        self._library = LibraryCheckpointing()
        self._trainer: Any = None
        self.history: tuple[Planned, ...] = ()

    # -- events -----------------------------------------------------------------------------------

    def on_init_end(self, *_: Any, **__: Any) -> None:
        """Make sure that the model is restored however training ends."""
        trainer = _trainer_of(self)
        trainer.train = functools.partial(self._train, trainer.train)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Switch other checkpointing off, and plan from the first step on."""
        self.remove()
        trainer = _trainer_of(self)
        _check_strategy(trainer)
        num_off = self._library.switch_off(trainer.model)
        if num_off:
            _log.warning(SWITCHED_OFF, num_off)
        steps = trainer.args.gradient_accumulation_steps
        loss = functools.update_wrapper(functools.partial(_loss, trainer), trainer.compute_loss)
        self._trainer = trainer
        wrapped = trainer.model_wrapped
        self._adaptive = Adaptive(
            # Of DDP the wrapper is planned, whose buckets are in the budget; FSDP2 has none.
            wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else trainer.model,
            self._budget,
            loss=loss,
            optimizer=getattr(trainer.optimizer, "optimizer", trainer.optimizer),
            buckets=self._buckets,
            chunks=self._chunks,
            most_plans=_MOST_PLANS,
            # The batches of one update are fetched together, and one more ahead of them.
            around=Surroundings(keeps_gradients=steps > 1, spare_batches=steps),
            on_planned=self._report,
        )
        trainer.training_step = functools.partial(self._step, trainer.training_step)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the plan off."""
        self.remove()

    def remove(self) -> None:
        """Leave model and trainer as they were; may be called again."""
        if self._adaptive is not None:
            self._adaptive.remove()
            self._adaptive = None
            vars(self._trainer).pop("training_step", None)
            self._trainer = None
        self._library.restore()

    # -- around the trainer -----------------------------------------------------------------------

    def _train(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            self.remove()

    def _step(
        self, step: Callable[..., Tensor], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Put the plan for the inputs on, then train on them."""
        num_items = args[0] if args else kwargs.get("num_items_in_batch")
        try:
            if self._adaptive is not None:
                self._trainer.model.train()  # as the step itself begins
                inputs = self._trainer._prepare_inputs(inputs)
                self._adaptive.prepare((inputs, num_items))
            return step(model, inputs, *args, **kwargs)
        except BaseException:
            self.remove()
            raise

    def _report(self, planned: Planned) -> None:
        self.history = (*self.history, planned)
        _log.warning("%s", planned.message)
        self._trainer.log(figures(planned))


_MOST_PLANS = 16


def _loss(trainer: Any, model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
    """Compute a step's loss as the trainer does."""
    inputs, num_items = batch
    with trainer.compute_loss_context_manager():
        # A copy: losses take labels out of what they are given.
        value = trainer.compute_loss(model, copy.copy(inputs), num_items_in_batch=num_items)
    return value / trainer.args.gradient_accumulation_steps  # type: ignore[no-any-return]


def _trainer_of(callback: TrainerCallback) -> Any:
    """Return the trainer that called a callback; see NOTE [ Which trainer ]."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and any(
            known is callback for known in caller.callback_handler.callbacks
        ):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise ApplyError(
        "RematCallback was called by no transformers.Trainer that has it among its callbacks: pass "
        "it as Trainer(..., callbacks=[RematCallback(budget=...)]), or use remat.adapt in a loop "
        "of your own."
    )


def _check_strategy(trainer: Any) -> None:
    reason = None
    if trainer.args.n_gpu > 1:
        reason = "DataParallel, whose replicas would run the plan of the first: use torchrun"
    elif trainer.is_deepspeed_enabled:
        reason = "DeepSpeed, whose gathered parameters are not in the budget: use FSDP2"
    elif trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        reason = 'FSDP1, whose flat parameters are not planned: set fsdp_config={"version": 2}'
    elif trainer.args.gradient_accumulation_steps > 1:
        reason = unplanned_accumulation(trainer.model, trainer.accelerator)
    if reason is not None:
        raise ApplyError(f"RematCallback does not go with {reason}; see docs/integrations.md.")
