"""Rewrites: decisions that change the program a step runs, put on modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from remat.errors import PlanMismatchError
from remat.planner.records import Rewrite, RewriteKind
from remat.regions.lazy_logits import SlicedHead, lazy_logits
from remat.regions.recall import called
from remat.regions.sliced_calls import CallRuntime, sliced_forward

# Any: a module's arguments and results are the user's own.

Forward = Callable[..., Any]


@dataclass(frozen=True)
class HeadRuntime:
    """How a sliced head is run; `replaced` is a forward that the instance already had."""

    head: SlicedHead
    replaced: Forward | None


def is_sliceable_head(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, whose forward is known to be `F.linear`."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in module.__dict__
    )


def install_rewrite(modules: Mapping[str, nn.Module], rewrite: Rewrite) -> None:
    """Put one rewrite on its module; `remat.regions.apply.remove` takes it off.

    Raises
    ------
    PlanMismatchError: if the module is not there, or is no longer what the plan was made for.
    """
    module = modules.get(rewrite.module)
    if module is None:
        raise PlanMismatchError(
            f"the plan slices module {rewrite.module!r}, which the model has not."
        )
    replaced = module.__dict__.get("forward")
    if rewrite.kind is not RewriteKind.LOSS_HEAD:
        by_tokens = rewrite.kind is RewriteKind.SLICED_TOKENS
        name = called(module, rewrite.module)
        call = CallRuntime(
            name,
            rewrite.num_slices,
            rewrite.arguments,
            replaced,
            by_tokens,
            keeps_choices=rewrite.keeps_choices,
        )
        module.__dict__["forward"] = functools.partial(sliced_forward, module, call)
        return
    if not is_sliceable_head(module):
        raise PlanMismatchError(
            f"the plan slices {rewrite.module!r} as a plain torch.nn.Linear, here it is "
            f"{type(module).__name__} or has a forward of its own. Make the plan again with "
            "remat.plan."
        )
    head = SlicedHead(rewrite.module, rewrite.num_slices)
    runtime = HeadRuntime(head, replaced)
    module.__dict__["forward"] = functools.partial(head_forward, module, runtime)


def rewrite_on(module: nn.Module) -> HeadRuntime | CallRuntime | None:
    """Return the rewrite that is on a module, if it is the outermost change to its forward."""
    forward: Any = module.__dict__.get("forward")  # Any: users put what they like there
    if isinstance(forward, functools.partial) and forward.func in (head_forward, sliced_forward):
        runtime = forward.args[1]
        assert isinstance(runtime, (HeadRuntime, CallRuntime))
        return runtime
    return None


def head_forward(module: nn.Module, runtime: HeadRuntime, *args: Any, **kwargs: Any) -> Any:
    """Return lazy logits where gradients are recorded; else run the module as it is."""
    weight: Any = module.weight  # Any: `nn.Module` types its attributes so
    bias: Any = module.bias
    if not kwargs and len(args) == 1 and _can_be_lazy(args[0], weight, bias):
        return lazy_logits(runtime.head, args[0], weight, bias)
    forward = runtime.replaced or functools.partial(type(module).forward, module)
    return forward(*args, **kwargs)


def _can_be_lazy(hidden: Any, weight: Any, bias: Any) -> bool:
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(_is_plain(t) for t in tensors)
        and any(t.requires_grad for t in tensors)
        and hidden.dim() >= 1
        and hidden.numel() > 0
    )


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is one of torch's own (sharded and quantized ones are others)."""
    is_own = type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)
    return is_own and tensor.is_floating_point() and not tensor.is_inference()
