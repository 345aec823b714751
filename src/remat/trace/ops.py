"""Ops as the dispatcher names them: what they write to, whether they draw, and their arguments.

What an op's schema says is looked up once: every attribute of it is a call into C++.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from remat.trace.records import TensorMeta

# Any: arguments of ops are whatever torch and the user pass.


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Walk the tensors in nested lists, tuples and mappings, and those inside of wrappers."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(value, name))
        else:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def nodes_in(value: Any) -> Iterator[Any]:
    """Walk the nodes of autograd's graph that made the tensors in a value; Any: torch's own."""
    for tensor in tensors_in(value):
        if tensor.grad_fn is not None:
            yield tensor.grad_fn


@functools.cache
def name_of(func: Any) -> str:
    """Return an op's name with its overload, such as `aten.mm.default`."""
    return str(func)


def is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op draws random numbers; attention does so only with dropout."""
    is_seeded, position = _draws(func)
    if not is_seeded or position is None:
        return is_seeded
    given = args[position] if position < len(args) else kwargs.get("dropout_p", 0.0)
    return bool(given != 0.0)


@functools.cache
def _draws(func: Any) -> tuple[bool, int | None]:
    """Return whether an op may draw, and which argument says how often, if one does."""
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("dropout_p") if "dropout_p" in names else None
    return torch.Tag.nondeterministic_seeded in func.tags, place


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """List the tensors that an op writes to, by its schema or by what is known of it."""
    schema_name, is_mutable, _ = _schema(func)
    return (
        written_to(func, args, kwargs) if is_mutable else _batch_norm_statistics(schema_name, args)
    )


def written_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """List the tensors that an op's schema says it writes to."""
    found: list[Tensor] = []
    for position, name in _schema(func)[2]:
        value = args[position] if position < len(args) else kwargs.get(name)
        found.extend(tensors_in(value))
    return found


@functools.cache
def _schema(func: Any) -> tuple[str, bool, tuple[tuple[int, str], ...]]:
    """Return an op's name, whether it writes to arguments, and their positions and names."""
    schema = func._schema
    places = (
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return schema.name, schema.is_mutable, tuple(places)


# Ops that update running statistics although their schema does not say so.
_BATCH_NORM_ARGUMENTS = {
    "aten::native_batch_norm": (3, 4, 5),
    "aten::cudnn_batch_norm": (3, 4, 5),
    "aten::miopen_batch_norm": (3, 4, 5),
}


def _batch_norm_statistics(schema_name: str, args: tuple[Any, ...]) -> list[Tensor]:
    where = _BATCH_NORM_ARGUMENTS.get(schema_name)
    if where is None or len(args) <= where[2] or not args[where[2]]:
        return []
    return [args[i] for i in where[:2] if isinstance(args[i], Tensor)]


def describe(value: Any) -> Any:
    """Turn an argument into hashable data without tensors."""
    if isinstance(value, Tensor):
        device = device_of_fake(value) if isinstance(value, FakeTensor) else value.device
        return TensorMeta(
            tuple(value.shape),
            tuple(value.stride()) if value.layout == torch.strided else (),
            dtype_name(value.dtype),
            device.type,
        )
    if isinstance(value, (list, tuple)):
        return tuple(describe(item) for item in value)
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"<{type(value).__name__}>"


def device_of_fake(fake: FakeTensor) -> torch.device:
    """Return where a fake tensor is, as its own dispatch of `.device` does, which is an op's."""
    return torch.device("meta") if fake.fake_mode.in_kernel_invocation else fake.fake_device


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, such as `float32`."""
    return str(dtype).removeprefix("torch.")
