"""Collectives in a trace: nothing is sent, and every call returns as if all had taken part."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

# Any: ops, their arguments and results are of many types.


def is_distributed(types: tuple[type, ...]) -> bool:
    """Whether an op is called on tensors that are spread over processes (`DTensor`)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in types)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that is spread over several."""
    if is_distributed((type(tensor),)):
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]
    return tensor


def unwrapped(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what this process holds of a tensor, and what wraps another in the same way."""
    if not is_distributed((type(tensor),)):
        return tensor, lambda other: other
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inside = {name: getattr(tensor, name) for name in names}  # the mesh is among them
    (name,) = (name for name, value in inside.items() if isinstance(value, Tensor))
    unflatten: Any = type(tensor).__tensor_unflatten__  # type: ignore[attr-defined]
    size, stride = tensor.shape, tensor.stride()
    return inside[name], lambda other: unflatten({**inside, name: other}, context, size, stride)


def results_of_collective(func: Any, args: tuple[Any, ...]) -> Any:
    """Return what an op of `c10d` returns: the tensors that it writes to, and work that is done."""
    from torch._C._distributed_c10d import FakeWork

    results = tuple(
        args[0] if "Tensor" in str(result.type) else FakeWork().boxed()
        for result in func._schema.returns
    )
    return results[0] if len(results) == 1 else results
