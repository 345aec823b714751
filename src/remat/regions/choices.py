"""Choices: which experts and which tokens, chosen once, in a region's first run, and kept.

NOTE [ Choices ]
A router takes the largest of its scores. Where two are nearly the same, a kernel that adds in
another order gives the other one first when the region runs again: the backward of one expert then
meets the activations of another, without an error where shapes agree (torchtitan#3146). So the
indices that an op chooses are kept from the first run, and are what it gives when the region runs
again; values that it returns with them are read anew from what it chose among. Random numbers are
drawn all the same, so that the generator moves as it did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self

from remat.trace.ops import name_of
from remat.trace.records import CHOOSING_OPS

# Any: ops and their arguments are torch's own, without types.

_DRAWS = torch.ops.aten.multinomial.default


class Choosing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Around a region's first run: keep what its ops choose, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chosen: list[tuple[Any, Tensor]] = []

    def __enter__(self) -> Self:
        self.chosen.clear()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if _chooses(func, args):
            indices = made[-1] if isinstance(made, tuple) else made
            self.chosen.append((func, indices.clone()))
        return made


class ChoosingAgain(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Around a recomputation: choose what was chosen before."""

    def __init__(self, first: Choosing) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._first = first
        self._next = 0

    def __enter__(self) -> Self:
        self._next = 0
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kept = self._kept(func, args)
        if kept is None:
            return func(*args, **kwargs)
        if func is _DRAWS:
            return func(*args, **kwargs).copy_(kept)
        indices = kept.clone()
        if len(func._schema.returns) == 1:
            return indices
        return _values_at(indices, args[0], _dimension(func, args, kwargs)), indices

    def _kept(self, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """Return what the op chose before, if it is the next one that did."""
        chosen = self._first.chosen
        if not _chooses(func, args) or self._next >= len(chosen) or chosen[self._next][0] != func:
            return None
        self._next += 1
        return chosen[self._next - 1][1]


def _chooses(func: Any, args: tuple[Any, ...]) -> bool:
    return name_of(func) in CHOOSING_OPS and args[0].is_floating_point()


def _dimension(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return along which dimension an op chooses, by its schema."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            given = args[place] if place < len(args) else argument.default_value
            return int(kwargs.get("dim", given))
    raise AssertionError(f"{func} chooses along no dimension")


def _values_at(indices: Tensor, source: Tensor, dim: int) -> Tensor:
    """Return the values of what was chosen among at the indices."""
    if not source.dim():
        return source.clone()
    if indices.dim() == source.dim():
        return source.gather(dim, indices)
    return source.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
