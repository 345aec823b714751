"""Leaves: the values inside the nested arguments and results of a call, and how they are nested."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any, Final

# Any: arguments of modules are whatever the user passes.

# How a value is nested, as hashable data: a leaf, or a container's type with what it holds.
Nesting = tuple[Any, ...]
_LEAF: Final[Nesting] = ("leaf",)
_CONSTANTS: Final = (bool, int, float, str, bytes, type(None))


def flatten(value: Any) -> tuple[list[Any], Nesting]:
    """Return the leaves of nested tuples, lists and dicts, in order, and how they are nested."""
    leaves: list[Any] = []
    return leaves, _flatten(value, leaves)


def _flatten(value: Any, leaves: list[Any]) -> Nesting:
    if type(value) in (tuple, list):
        return (type(value), *(_flatten(item, leaves) for item in value))
    if type(value) is dict:
        return (dict, *((key, _flatten(item, leaves)) for key, item in value.items()))
    leaves.append(value)
    return _LEAF


def unflatten(nesting: Nesting, leaves: Sequence[Any]) -> Any:
    """Nest leaves again; the inverse of `flatten`."""
    waiting = iter(leaves)
    return _unflatten(nesting, waiting)


def _unflatten(nesting: Nesting, waiting: Any) -> Any:
    kind, *items = nesting
    if kind == "leaf":
        return next(waiting)
    if kind is dict:
        return {key: _unflatten(item, waiting) for key, item in items}
    return kind(_unflatten(item, waiting) for item in items)


class Identities:
    """Names for leaves that are equal only for one and the same object, or for equal constants.

    Objects are told apart by weak references, so that no lifetime changes and an address that is
    used again is not mistaken for what was there before.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._count = 0

    def of(self, leaf: Any) -> object:
        """Return the name of a leaf."""
        if isinstance(leaf, _CONSTANTS):
            return (type(leaf).__name__, repr(leaf))
        known = self._known.get(id(leaf))
        if known is not None and known[0]() is leaf:
            return known[1]
        self._count += 1
        # Where no weak reference can be made, it is never the same as anything.
        with contextlib.suppress(TypeError):
            self._known[id(leaf)] = (weakref.ref(leaf), self._count)
        return self._count
