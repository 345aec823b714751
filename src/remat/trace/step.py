"""What one training step is: default loss and optimizer, and checks on what a user gives."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from remat.errors import RematError, WorkloadError
from remat.trace.records import BACKWARD, FORWARD

# Any: batches and model outputs are the user's own types.
Loss = Callable[[nn.Module, Any], Tensor]
OptimizerLike = (
    Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | torch.optim.Optimizer | None
)


# Where a step can fail, for messages.
OPTIMIZER_STEP: Final = "the optimizer's step"


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer that is assumed where none is given: `torch.optim.AdamW`."""
    return torch.optim.AdamW(parameters)


DEFAULT_OPTIMIZER: Final = adamw


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Call the model on the batch and find the loss in what it returns.

    A mapping is passed as keywords, a tuple or list as arguments, a tensor as one argument;
    the loss is `.loss`, `["loss"]`, or the output itself if it is a scalar tensor.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    else:
        output = model(batch)
    return loss_in(output)


def loss_in(output: Any) -> Tensor:
    """Find the loss in what a model returned: `.loss`, `["loss"]`, or the output itself.

    Raises
    ------
    WorkloadError: if there is none.
    """
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None and isinstance(output, Tensor) and output.numel() == 1:
        found = output
    if found is None:
        is_tensor = isinstance(output, Tensor)
        what = f"Tensor of shape {tuple(output.shape)}" if is_tensor else type(output).__name__
        raise WorkloadError(
            f"the model returned {what}, in which no scalar loss was found: pass loss=, a function "
            "(model, batch) -> scalar tensor."
        )
    return found  # type: ignore[no-any-return]


def compute_loss(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Run forward and loss, and check that the result can be differentiated.

    Raises
    ------
    WorkloadError: if the loss is no scalar tensor, or nothing in it requires a gradient.
    """
    if loss is not None and not callable(loss):
        raise WorkloadError(
            f"loss must be a function (model, batch) -> scalar tensor or None, got "
            f"{type(loss).__name__}."
        )
    value = (loss or default_loss)(model, batch)
    if not isinstance(value, Tensor):
        raise WorkloadError(
            f"loss returned {type(value).__name__}, expected a scalar tensor with a gradient."
        )
    if value.numel() != 1:
        raise WorkloadError(
            f"loss returned a tensor of shape {tuple(value.shape)}, expected a scalar: reduce it, "
            "for example with .mean()."
        )
    if not value.requires_grad:
        raise WorkloadError(
            "the loss requires no gradient: every parameter is frozen, or the forward runs under "
            "torch.no_grad(). Nothing is kept for backward, so there is nothing to plan."
        )
    return value


def differentiate(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Run a real step's forward and backward from a clean cache of autocast; return the loss.

    Raises
    ------
    WorkloadError: for whatever the model, the loss or autograd raises.
    """
    torch.clear_autocast_cache()  # the last step's casts are of the last step's weights
    with explained(FORWARD):
        value = compute_loss(model, batch, loss)
    with explained(BACKWARD):
        value.backward()  # type: ignore[no-untyped-call]
    return value


def advance(optimizer: torch.optim.Optimizer | None) -> None:
    """Let a real step's optimizer step.

    Raises
    ------
    WorkloadError: for whatever the optimizer raises.
    """
    if optimizer is not None:
        with explained(OPTIMIZER_STEP):
            optimizer.step()


@contextlib.contextmanager
def explained(stage: str) -> Iterator[None]:
    """Turn what the user's code raises into an error that says where the step failed.

    Raises
    ------
    WorkloadError: for every error but our own and the device's lack of memory.
    """
    try:
        yield
    except (RematError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise WorkloadError(explain_failure(stage, error)) from error


def explain_failure(stage: str, error: Exception) -> str:
    """Say where a step failed, how, and what to check."""
    hint = (
        "Check that this optimizer can step without arguments over the model's gradients."
        if stage == OPTIMIZER_STEP
        else "Check that the model accepts this batch and that loss= fits both."
    )
    return (
        f"the training step failed in {stage}: {type(error).__name__}: {first_line(error)}. {hint}"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else "no message"


def check_model(model: Any) -> None:
    """Refuse what is no trainable eager module.

    Raises
    ------
    WorkloadError: for anything but an `nn.Module`, for TorchScript modules, for lazy modules whose
        shapes are not known yet, and for modules that Opacus has wrapped.
    """
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise WorkloadError(
                f"{where} has lazy parameters that are not initialized: run one forward pass first."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise WorkloadError(
                f"{where} is a TorchScript module, whose compiled forward cannot be traced or "
                "recomputed in parts: pass the Python module that it was scripted from."
            )
        if any(base.__name__ == "AbstractGradSampleModule" for base in type(module).__mro__):
            raise WorkloadError(
                f"{where} is wrapped by Opacus, whose per-sample gradients belong to the real "
                "parameters: plan and apply on the model inside, which is wrapped._module, or "
                "before wrapping it. Memory of per-sample gradients is not in the budget."
            )


def make_optimizer(
    optimizer: OptimizerLike,
    model: nn.Module,
    translate: Callable[[Tensor], Tensor] = lambda parameter: parameter,
) -> torch.optim.Optimizer | None:
    """Build the step's optimizer over the model's present parameters.

    An optimizer instance is rebuilt over them with the same settings and fresh state: its state is
    created again by the first step, with the same shapes. `translate` gives the present parameter
    for each one that the instance holds.

    Raises
    ------
    WorkloadError: if what is given neither is nor builds an optimizer.
    """
    if optimizer is None:
        return None
    if isinstance(optimizer, torch.optim.Optimizer):
        return _rebuilt(optimizer, model, translate)
    if not callable(optimizer):
        raise WorkloadError(
            f"optimizer must be a function (parameters) -> Optimizer, an Optimizer or None, "
            f"got {type(optimizer).__name__}."
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise WorkloadError(
            "no parameter of the model requires a gradient, so there is nothing to train: unfreeze "
            "some, or pass optimizer=None."
        )
    try:
        made = optimizer(trainable)
    except Exception as error:
        raise WorkloadError(
            f"optimizer(parameters) failed: {type(error).__name__}: {first_line(error)}. Pass a "
            "function (parameters) -> Optimizer, an Optimizer or None."
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise WorkloadError(
            f"optimizer(parameters) returned {type(made).__name__}, expected a "
            "torch.optim.Optimizer."
        )
    return made


def _rebuilt(
    optimizer: torch.optim.Optimizer, model: nn.Module, translate: Callable[[Tensor], Tensor]
) -> torch.optim.Optimizer:
    fresh = copy.copy(optimizer)
    fresh.state = defaultdict(dict)
    fresh.param_groups = [
        {**group, "params": [translate(p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    present = set(map(id, model.parameters()))
    if not any(id(p) in present for group in fresh.param_groups for p in group["params"]):
        raise WorkloadError(
            f"the {type(optimizer).__name__} given as optimizer holds none of this model's "
            "parameters: build it from model.parameters(), or pass a function (parameters) -> "
            "Optimizer."
        )
    return fresh
