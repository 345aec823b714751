"""Key-value caches of Transformers, which a model fills in training although nothing reads them.

NOTE [ Filling a cache twice ]
A layer that runs again would append its keys and values to the cache a second time
(transformers#28056). Where the layer's entry was empty before the call, the recomputation is given
an empty cache of the same kind instead: it sees what the first run saw, and the real cache is
filled once. Where the entry was not empty, the call is no region.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

# Any: caches are another library's objects, and arguments are the user's own.


class Filled:
    """Which entries of a cache hold something; equal to a later state that fills empty ones."""

    def __init__(self, cache: Any) -> None:
        self.entries = frozenset(_entries(cache))

    def __eq__(self, later: object) -> bool:
        return isinstance(later, Filled) and self.entries <= later.entries

    __hash__ = None  # type: ignore[assignment]


def is_cache(value: object) -> bool:
    """Whether a value is a cache that can be replaced by an empty one."""
    library: Any = sys.modules.get("transformers.cache_utils")
    if library is None:
        return False
    if isinstance(value, library.EncoderDecoderCache):
        halves = (value.self_attention_cache, value.cross_attention_cache)
        return all(type(half) is library.DynamicCache for half in halves)
    return type(value) is library.DynamicCache


def caches_in(arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> list[Any]:
    """List the caches among a call's arguments."""
    args, kwargs = arguments
    return [value for value in (*args, *kwargs.values()) if is_cache(value)]


def with_empty_caches(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace each cache among a call's arguments by an empty one of its kind."""
    return (
        tuple(_empty(value) if is_cache(value) else value for value in args),
        {key: _empty(value) if is_cache(value) else value for key, value in kwargs.items()},
    )


def _empty(cache: Any) -> Any:
    library: Any = sys.modules["transformers.cache_utils"]
    if isinstance(cache, library.EncoderDecoderCache):
        return library.EncoderDecoderCache(library.DynamicCache(), library.DynamicCache())
    return library.DynamicCache()


def _entries(cache: Any) -> list[tuple[str, int, int]]:
    halves = {
        "self": getattr(cache, "self_attention_cache", cache),
        "cross": getattr(cache, "cross_attention_cache", None),
    }
    return [
        (name, number, id(layer.keys))
        for name, half in halves.items()
        for number, layer in enumerate(getattr(half, "layers", ()))
        if getattr(layer, "keys", None) is not None and layer.keys.numel() > 0
    ]
