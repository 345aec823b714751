"""A callback for Lightning's Trainer: every step of its training within a budget.

It is a callback of `pytorch_lightning` or of `lightning.pytorch`, whichever has been imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from remat.adapting.adapt import Adaptive, Planned
from remat.adapting.around import Surroundings
from remat.errors import ApplyError, MissingPackageError, WorkloadError
from remat.integrations.reports import SWITCHED_OFF, LibraryCheckpointing, figures
from remat.units import parse_budget

# Any: Lightning's trainer and modules are of one of two packages; batches are the user's own.

_PACKAGES: Final = ("pytorch_lightning", "lightning.pytorch")
_STRATEGIES: Final = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_MOST_PLANS: Final = 16


def _library() -> Any:
    loaded = [name for name in _PACKAGES if name in sys.modules]
    for name in (*loaded, *_PACKAGES):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise MissingPackageError("pytorch_lightning", "integrations", "remat.integrations.lightning")


_lightning: Any = _library()
_Callback: Any = _lightning.Callback
_say = importlib.import_module(f"{_lightning.__name__}.utilities.rank_zero").rank_zero_info


class RematCallback(_Callback):  # type: ignore[misc]  # the base is found at run time
    """Plan on the first batch, and again where shapes change; take the plan off at the end.

    The step that is planned is `training_step`, with the trainer's optimizer, precision and
    gradient accumulation; nothing that it logs while it is traced is kept. What was decided goes
    to the trainer's loggers (`remat/predicted_peak_bytes` and others). Gradient checkpointing of
    Transformers' and timm's models inside is switched off meanwhile. The model is as it was at the
    end, also after an exception.

    Arguments
    ---------
    budget, buckets, chunks: as for `remat.adapt`. A percentage is of the first batch's peak.

    Raises
    ------
    BudgetError: by `trainer.fit()`, if a step on some batch cannot be kept within the budget.
    ApplyError: by `trainer.fit()`, for manual optimization, DeepSpeed, FSDP1 and others that shard
        in ways of their own; `ModelParallelStrategy` (FSDP2) is planned.

    Example
    -------
    ```python
    trainer = Trainer(callbacks=[RematCallback(budget="8GiB")])
    trainer.fit(module, loader)
    ```
    """

    def __init__(
        self,
        budget: int | str,
        *,
        buckets: Sequence[int] | None = None,
        chunks: bool | None = None,
    ) -> None:
        super().__init__()
        parse_budget(budget, keep_all_peak_bytes=1 << 40)  # what cannot be read is said here
        self._budget, self._buckets, self._chunks = budget, buckets, chunks
        self._adaptive: Adaptive | None = None
        self._checkpointing = LibraryCheckpointing()
        self.history: tuple[Planned, ...] = ()

    # -- events -----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Switch other checkpointing off, and plan from the first batch on."""
        self.remove()
        _check_loop(trainer, pl_module)
        num_off = self._checkpointing.switch_off(pl_module)
        if num_off:
            _say(SWITCHED_OFF % num_off)
        loss = functools.update_wrapper(functools.partial(_loss, trainer), pl_module.training_step)
        accumulates = trainer.accumulate_grad_batches > 1
        wrapped = trainer.strategy.model
        self._adaptive = Adaptive(
            # Of DDP the wrapper is planned, whose buckets are in the budget; FSDP2 has none.
            wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else pl_module,
            self._budget,
            loss=loss,
            optimizer=trainer.optimizers[0],
            buckets=self._buckets,
            chunks=self._chunks,
            most_plans=_MOST_PLANS,
            # Lightning sets gradients to none between a step's forward and its backward. It fetches
            # a batch ahead where it cannot know the number of batches, onto the CPU.
            around=Surroundings(
                keeps_gradients=accumulates,
                clears_late=True,
                spare_batches=int(
                    pl_module.device.type == "cpu" and math.isinf(trainer.num_training_batches)
                ),
            ),
            on_planned=functools.partial(self._report, trainer),
        )

    def on_train_batch_start(self, _trainer: Any, _module: Any, batch: Any, batch_idx: int) -> None:
        """Put the plan for a batch on."""
        if self._adaptive is not None:
            self._adaptive.prepare((batch, batch_idx))

    def on_train_end(self, *_: Any) -> None:
        """Take the plan off."""
        self.remove()

    def on_exception(self, *_: Any) -> None:
        """Take the plan off."""
        self.remove()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Take the plan off."""
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was; may be called again."""
        if self._adaptive is not None:
            self._adaptive.remove()
            self._adaptive = None
        self._checkpointing.restore()

    def _report(self, trainer: Any, planned: Planned) -> None:
        self.history = (*self.history, planned)
        _say(planned.message)
        for logger in trainer.loggers:
            logger.log_metrics(figures(planned), step=trainer.global_step)


def _check_loop(trainer: Any, module: Any) -> None:
    reason = None
    strategy = type(trainer.strategy).__name__
    if not module.automatic_optimization:
        reason = "manual optimization, whose steps it cannot see: use remat.adapt inside them"
    elif strategy not in _STRATEGIES:
        reason = (
            f"{strategy}, whose gathered parameters are not in the budget: shard with "
            "torch.distributed.fsdp.fully_shard under ModelParallelStrategy"
        )
    if reason is not None:
        raise ApplyError(f"RematCallback does not go with {reason}; see docs/integrations.md.")


def _loss(trainer: Any, module: Any, batch: tuple[Any, int]) -> Tensor:
    """Compute a step's loss as the trainer does, and keep nothing that the module logs.

    Of a module in DDP the step is called itself: Lightning puts it in the place of the module's
    forward for the one call of the wrapper, where no region is.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    with trainer.precision_plugin.train_step_context(), _logging_nothing(trainer, module):
        value = module.training_step(*batch[: _num_arguments(module)])
    value = value.get("loss") if isinstance(value, Mapping) else value
    if value is None:
        raise WorkloadError("training_step returned no loss, so that there is nothing to plan.")
    return value / trainer.accumulate_grad_batches  # type: ignore[no-any-return]


def _num_arguments(module: Any) -> int:
    code = getattr(module.training_step, "__code__", None)
    takes_index = code is None or code.co_argcount > 2 or "batch_idx" in code.co_varnames
    return 2 if takes_index else 1


@contextlib.contextmanager
def _logging_nothing(trainer: Any, module: Any) -> Iterator[None]:
    attributes = module.__dict__
    before = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
    attributes.update(log=_do_nothing, log_dict=_do_nothing)
    if module._trainer is None:  # a copy, made where a step needs real values
        module.trainer = trainer
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del attributes[name]
        attributes.update(before)


def _do_nothing(*_: Any, **__: Any) -> None:
    return None
