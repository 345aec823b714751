"""What one training step is: default loss and optimizer, and checks on what a user gives."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from remat.errors import WorkloadError

# Any: batches and model outputs are the user's own types.
Loss = Callable[[nn.Module, Any], Tensor]
OptimizerLike = (
    Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | torch.optim.Optimizer | None
)


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
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None and isinstance(output, Tensor) and output.numel() == 1:
        found = output
    if found is None:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise WorkloadError(
            f"the model returned {type(output).__name__}{shape}, in which no scalar loss was "
            "found: pass loss=, a function (model, batch) -> scalar tensor."
        )
    return found  # type: ignore[no-any-return]


def compute_loss(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Run forward and loss, and check that the result can be differentiated.

    Raises
    ------
    WorkloadError: if the loss is no scalar tensor, or nothing in it requires a gradient.
    """
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


def check_model(model: Any) -> None:
    """Refuse what is no trainable eager module.

    Raises
    ------
    WorkloadError: for anything but an `nn.Module`, and for TorchScript modules.
    """
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"its part {name!r}" if name else "the model"
            raise WorkloadError(
                f"{where} is a TorchScript module, whose compiled forward cannot be traced or "
                "recomputed in parts: pass the Python module that it was scripted from."
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
        return _rebuilt(optimizer, translate)
    if not callable(optimizer):
        raise WorkloadError(
            f"optimizer must be a function (parameters) -> Optimizer, an Optimizer or None, "
            f"got {type(optimizer).__name__}."
        )
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    if not isinstance(made, torch.optim.Optimizer):
        raise WorkloadError(
            f"optimizer(parameters) returned {type(made).__name__}, expected a "
            "torch.optim.Optimizer."
        )
    return made


def _rebuilt(
    optimizer: torch.optim.Optimizer, translate: Callable[[Tensor], Tensor]
) -> torch.optim.Optimizer:
    fresh = copy.copy(optimizer)
    fresh.state = defaultdict(dict)
    fresh.param_groups = [
        {**group, "params": [translate(p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return fresh
