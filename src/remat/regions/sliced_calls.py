"""Module calls in slices of the batch: each slice a region, the results put together again."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from remat.regions.runtime import RegionRuntime, StepClock, is_recomputing, region_forward

# Any: a module's arguments and results are the user's own.


@dataclass
class CallRuntime:
    """How a sliced module is run.

    `arguments` are the places of the tensors that are cut along their first dimension, among the
    leaves of the call's (args, kwargs). `replaced` is a forward that the instance already had.
    """

    num_slices: int
    arguments: tuple[int, ...]
    replaced: Callable[..., Any] | None
    region: RegionRuntime = field(init=False)

    def __post_init__(self) -> None:
        self.region = RegionRuntime(StepClock(), replaced=self.replaced)


def sliced_forward(module: nn.Module, runtime: CallRuntime, *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward on slices of its batch, one after another, each recomputed later."""
    cut = None
    if torch.is_grad_enabled() and not is_recomputing() and not torch.compiler.is_compiling():
        cut = cut_arguments((args, kwargs), runtime.arguments, runtime.num_slices)
    if cut is None:
        forward = runtime.replaced or types.MethodType(type(module).forward, module)
        return forward(*args, **kwargs)
    return joined([region_forward(module, runtime.region, *given, **named) for given, named in cut])


def cut_arguments(
    call: tuple[Any, Any], places: tuple[int, ...], num_slices: int
) -> list[tuple[Any, Any]] | None:
    """Cut the tensors at `places` among a call's leaves; `None` where they cannot be cut alike."""
    leaves, structure = tree_flatten(call)
    if places[-1] >= len(leaves):
        return None
    chosen = [leaves[place] for place in places]
    if not all(isinstance(t, Tensor) and t.dim() for t in chosen):
        return None
    sizes = {t.shape[0] for t in chosen}
    if len(sizes) != 1 or sizes.pop() < 2:
        return None
    pieces = [t.chunk(num_slices) for t in chosen]
    calls = []
    for number in range(len(pieces[0])):
        for place, piece in zip(places, pieces, strict=True):
            leaves[place] = piece[number]
        calls.append(tree_unflatten(leaves, structure))
    return calls


def joined(results: list[Any]) -> Any:
    """Put the slices' results, tensors or nested tuples of them, together along the batch."""
    flat = [tree_flatten(result) for result in results]
    whole = [
        torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(whole, flat[0][1])
