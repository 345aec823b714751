"""A plan in the place of the model's own checkpointing, whose calls run plainly under the plan.

NOTE [ Replaced checkpointing ]
A plan made by `remat.replace_checkpointing` was traced with the model's own checkpointing switched
off, and holds only so. While it is on, each module that has parts runs its forward with the switch
off: in the step's forward and also when a region is run again, as both must save the same tensors.
Other models in the process keep their checkpointing. torch.compile does not look up what is
switched here: compiled, the model's own checkpointing stays on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from remat.trace.checkpoints import checkpointing_off

# Any: a module's arguments and results are the user's own.


def silence(model: nn.Module) -> None:
    """Let a model's own checkpointing run plainly until `unsilence`; before regions are put on."""
    for module in model.modules():
        if next(module.children(), None) is not None:
            replaced = module.__dict__.get("forward")
            module.__dict__["forward"] = functools.partial(_quiet_forward, module, replaced)


def unsilence(model: nn.Module) -> None:
    """Put back what `silence` replaced; after regions are taken off."""
    for module in model.modules():
        forward: Any = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func is _quiet_forward:
            if forward.args[1] is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward.args[1]


def _quiet_forward(
    module: nn.Module, replaced: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    forward = replaced or functools.partial(type(module).forward, module)
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    with checkpointing_off():
        return forward(*args, **kwargs)
