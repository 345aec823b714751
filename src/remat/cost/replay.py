"""Replay: run one recorded op by itself on made-up values of the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from remat.trace.records import OpSignature, TensorMeta

# Kernels that read opaque state written by another call crash on made-up values.
_UNSAFE = ("rnn", "lstm", "gru")
_RECURRENT = "aten.mkldnn_rnn_layer.default"
_RECURRENT_BACKWARD = "aten.mkldnn_rnn_layer_backward.default"

# Drawing random numbers takes longer than many kernels that read them.
_NUM_VALUES = 2**16

# Any: arguments of ops are of many types.


def replay(signature: OpSignature, device: torch.device) -> Callable[[], Any] | None:
    """Return a function that runs the op; `None` if it cannot be run alone.

    Floating point inputs are random numbers, a few over and over, integers zero (valid as indices),
    booleans true.
    """
    operator = find_operator(signature.name)
    is_known = signature.name in (_RECURRENT, _RECURRENT_BACKWARD)
    if not is_known and any(part in signature.name for part in _UNSAFE):
        return None
    if operator is None or _holds_opaque((signature.arguments, signature.keywords)):
        return None
    arguments = _build(signature.arguments, device)
    keywords = {key: _build(value, device) for key, value in signature.keywords}

    if signature.name == _RECURRENT_BACKWARD:
        arguments = _with_reserve(arguments)

    def run() -> Any:
        with torch.set_grad_enabled(is_known):  # recurrent kernels keep a reserve only then
            return operator(*arguments, **keywords)

    return run


def _with_reserve(given: list[Any]) -> list[Any]:
    """Give oneDNN's recurrent backward what its forward makes of the same sequence."""
    reverse, mode, hidden, layers, has_biases, train, both_ways, sizes, is_first = given[13:22]
    rest = (reverse, sizes, mode, hidden, layers, has_biases, both_ways, is_first, train)
    with torch.enable_grad():
        *results, reserve = find_operator(_RECURRENT)(*given[:7], *rest)
    return [*given[:7], *results, *given[10:22], reserve]


def find_operator(name: str) -> Any:
    """Look an op up by the name that the trace recorded, such as `aten.mm.default`, or `None`."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def moved_bytes(signature: OpSignature) -> int:
    """Return the bytes of an op's tensor arguments."""
    return sum(
        meta.num_elements * getattr(torch, meta.dtype).itemsize
        for meta in _metas((signature.arguments, signature.keywords))
    )


def _metas(value: object) -> list[TensorMeta]:
    if isinstance(value, TensorMeta):
        return [value]
    if isinstance(value, tuple):
        return [meta for item in value for meta in _metas(item)]
    return []


def _build(value: Any, device: torch.device) -> Any:
    if isinstance(value, TensorMeta):
        return _tensor(value, device)
    if isinstance(value, tuple):
        return [_build(item, device) for item in value]
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return value


def _tensor(meta: TensorMeta, device: torch.device) -> Tensor:
    dtype = getattr(torch, meta.dtype)
    if meta.num_elements == 0:
        return torch.empty_strided(meta.shape, meta.stride, dtype=dtype, device=device)
    # Expanded tensors have fewer elements in memory than in their shape.
    span = 1 + sum((n - 1) * step for n, step in zip(meta.shape, meta.stride, strict=True))
    if dtype.is_floating_point or dtype.is_complex:
        few = torch.randn(min(span, _NUM_VALUES), device=device).to(dtype)
        flat = few.repeat(-(-span // _NUM_VALUES))[:span]
    else:
        flat = torch.full((span,), dtype is torch.bool, dtype=dtype, device=device)
    return flat.as_strided(meta.shape, meta.stride)


def _holds_opaque(value: object) -> bool:
    if isinstance(value, tuple):
        return any(_holds_opaque(item) for item in value)
    return isinstance(value, str) and value.startswith("<")
