"""Module calls in slices of the batch or of the tokens: regions, their results put together."""

from __future__ import annotations

import functools
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

    `arguments` are the places of the tensors that are cut, among the leaves of the call's (args,
    kwargs): along their first dimension, or, where the call is cut `by_tokens`, the one tensor
    there along its rows. `replaced` is a forward that the instance already had; `name` is what
    errors call the module; one that `keeps_choices` has what its ops choose kept, for each slice.
    """

    name: str
    num_slices: int
    arguments: tuple[int, ...]
    replaced: Callable[..., Any] | None
    by_tokens: bool
    keeps_choices: bool = False
    region: RegionRuntime = field(init=False)

    def __post_init__(self) -> None:
        # Slices of tokens stay slices where a region around them runs again.
        self.region = RegionRuntime(
            StepClock(),
            keeps_choices=self.keeps_choices,
            replaced=self.replaced,
            is_nested=self.by_tokens,
            name=self.name,
        )


def sliced_forward(module: nn.Module, runtime: CallRuntime, *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward on slices, one after another, each recomputed later."""
    if runtime.by_tokens:
        return _by_tokens(module, runtime, *args, **kwargs)
    cut = None
    if torch.is_grad_enabled() and not is_recomputing() and not torch.compiler.is_compiling():
        cut = cut_arguments((args, kwargs), runtime.arguments, runtime.num_slices)
    if cut is None:
        forward = runtime.replaced or functools.partial(type(module).forward, module)
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


def _by_tokens(module: nn.Module, runtime: CallRuntime, *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward on slices of its rows; whole where its result is not one of rows."""
    forward = runtime.replaced or functools.partial(type(module).forward, module)
    (place,) = runtime.arguments
    leaves, structure = tree_flatten((args, kwargs))
    whole = leaves[place] if place < len(leaves) else None
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not isinstance(whole, Tensor)
        or whole.dim() < 2
    ):
        return forward(*args, **kwargs)
    results = []
    for part in cut_rows(whole, runtime.num_slices):
        leaves[place] = part
        given, named = tree_unflatten(leaves, structure)
        results.append(region_forward(module, runtime.region, *given, **named))
        if not _has_rows_of(results[-1], part):
            return forward(*args, **kwargs)
    del leaves
    return joined_rows(results, whole)


def cut_rows(whole: Tensor, num_slices: int) -> list[Tensor]:
    """Cut a tensor (..., K) along its rows, all dimensions but the last, which become one."""
    rows = whole.reshape(*(1 for _ in whole.shape[:-2]), -1, whole.shape[-1])
    return list(rows.chunk(num_slices, dim=-2))


def joined_rows(results: list[Tensor], whole: Tensor) -> Tensor:
    """Put the results for slices of rows together, in the shape of what was cut."""
    return torch.cat(results, dim=-2).reshape(*whole.shape[:-1], results[0].shape[-1])


def _has_rows_of(result: Any, part: Tensor) -> bool:
    return isinstance(result, Tensor) and result.shape[:-1] == part.shape[:-1]
