"""What a module call leaves behind in Python: attributes, caches and other objects it changed."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Generator, Tensor, nn

from remat.trace.caches import Filled, is_cache
from remat.trace.generators import is_generator, state_of

# Any: modules hold, and are called with, whatever the user made.

_MODULE_TABLES: Final = frozenset(nn.Module().__dict__)
_ABSENT: Final = object()
_DEEPEST: Final = 4
_MOST_ITEMS: Final = 1000
_OPAQUE: Final = (
    nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    types.ModuleType, str, bytes,
)  # fmt: skip


def visible_state(module: nn.Module, arguments: Any) -> dict[str, object]:
    """Return a comparable picture of a module's own attributes and of what it was passed.

    By identity, following lists, mappings and objects a few levels down; it holds no reference.
    Writes into parameters and buffers are left to the record of ops; here it counts which tensors
    they are.
    """
    found: dict[str, object] = {f"parameter {k!r}": id(v) for k, v in module._parameters.items()}
    found.update((f"buffer {k!r}", id(v)) for k, v in module._buffers.items())
    own = {k: v for k, v in module.__dict__.items() if k not in _MODULE_TABLES and k != "forward"}
    for name, value in own.items():
        _look(value, f"attribute {name!r}", 0, found)
    for path, value in _objects(arguments, "argument"):
        _look(value, path, 0, found)
    return found


def first_change(before: Mapping[str, object], after: Mapping[str, object]) -> str:
    """Name the first place in which two pictures differ; "" if they are equal."""
    if before == after:
        return ""
    places = {**before, **after}
    return next(p for p in places if before.get(p, _ABSENT) != after.get(p, _ABSENT))


def _objects(arguments: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Walk past the argument tuples and keywords themselves to what was passed."""
    args, kwargs = arguments
    for position, value in enumerate(args):
        yield f"{path} {position}", value
    for name, value in kwargs.items():
        yield f"{path} {name!r}", value


def _look(value: Any, path: str, depth: int, found: dict[str, object]) -> None:
    if len(found) >= _MOST_ITEMS:
        return
    if value is None or isinstance(value, (bool, int, float)):
        found[path] = value
        return
    found[path] = id(value)
    if is_generator(value):  # torch's show in the ops, which say whether they drew
        found[f"state of {path}"] = None if isinstance(value, Generator) else str(state_of(value))
        return
    if is_cache(value):
        found[f"entries of {path}"] = Filled(value)
        return
    if depth >= _DEEPEST or isinstance(value, (Tensor, *_OPAQUE)):
        return
    if isinstance(value, (set, frozenset)):
        found[f"length of {path}"] = len(value)
    for place, item in itertools.islice(_items(value), _MOST_ITEMS):
        _look(item, path + place, depth + 1, found)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return ((f"[{key!r}]", item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ((f"[{position}]", item) for position, item in enumerate(value))
    return ((f".{name}", item) for name, item in getattr(value, "__dict__", {}).items())
