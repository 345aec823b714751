"""The forward of a model that finds the plan for its arguments before it runs.

NOTE [ The gate ]
It is the outermost forward of the model's instance, around a region that may be there too, and
calls what was beneath it when it was put on last. Switching plans takes it off and puts it on
again. A copy of the model, or one that was pickled, has a gate that is open: it runs what is
beneath, and plans nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from remat.errors import ApplyError

# Any: a model's arguments and results are the user's own.

Choose = Callable[[tuple[Any, ...], dict[str, Any]], None]


class Gate:
    """What is asked before each forward that records gradients; see NOTE [ The gate ]."""

    def __init__(self, choose: Choose | None) -> None:
        self._choose = choose
        self._beneath: Callable[..., Any] | None = None

    def put_on(self, model: nn.Module) -> None:
        """Make the model ask before each forward."""
        self._beneath = model.__dict__.get("forward")
        model.__dict__["forward"] = functools.partial(gated_forward, model, self)

    def take_off(self, model: nn.Module) -> None:
        """Put back the forward that was beneath.

        Raises
        ------
        ApplyError: if another forward has been put around it.
        """
        if not self.is_on(model):
            raise ApplyError(
                "something else has replaced the model's forward since remat.adapt: wrap or "
                "prepare the model first, and adapt it then."
            )
        if self._beneath is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = self._beneath

    def is_on(self, model: nn.Module) -> bool:
        """Whether this gate is the model's forward."""
        forward = model.__dict__.get("forward")
        return (
            isinstance(forward, functools.partial)
            and forward.func is gated_forward
            and forward.args[1] is self
        )

    def ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the plan for these arguments put on."""
        if self._choose is not None and torch.is_grad_enabled():
            self._choose(args, kwargs)

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what is beneath."""
        beneath = self._beneath or functools.partial(type(model).forward, model)
        return beneath(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"_choose": None, "_beneath": self._beneath}


def gated_forward(model: nn.Module, gate: Gate, *args: Any, **kwargs: Any) -> Any:
    """Find the plan for the arguments, and run the forward under it."""
    if not torch.compiler.is_compiling():
        gate.ask(args, kwargs)
    return gate.run(model, args, kwargs)
