"""Packed results: kept in fewer bits between forward and backward, and the same bits when read.

What is packed how is told in NOTE [ Packing ] of `remat.planner.packing`. Here it is decided anew
from the ops that really run: a plan only names them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from remat.planner.packing import NARROW, POOLS, SCALED_BY, UNPACKED_AT_ONCE
from remat.trace.records import EMPTY_OPS
from remat.trace.saved import is_plain

# Any: ops and their arguments are torch's own, without types.

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_DRAWS = "aten::bernoulli_"

# Eight bytes that are 0 or 1, read as one integer (the first is the lowest) and multiplied by
# _GATHER, have their values side by side in the highest byte: byte i times 2**(56 - 7 i) lands on
# bit 56 + i, and no two of the products fall on one bit. Back: a byte in every place, of which
# place i keeps bit i.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_PLACES = 0x8040201008040201 - 2**64


class AbstractPacked(ABC):
    """One result in fewer bits."""

    @abstractmethod
    def unpacked(self) -> Tensor:
        """Make the result again: the same bits in the same layout."""


class Booleans(AbstractPacked):
    """A bit for each of a multiple of eight booleans."""

    def __init__(self, values: Tensor) -> None:
        self._shape, self._stride = tuple(values.shape), values.stride()
        words = _flat(values).view(torch.int64) * _GATHER
        self._bits = words.bitwise_right_shift_(56).to(torch.uint8)

    def unpacked(self) -> Tensor:
        """Make the booleans again."""
        words = self._bits.to(torch.int64).mul_(_SPREAD).bitwise_and_(_PLACES)
        made = self._bits.new_empty_strided(self._shape, self._stride, dtype=torch.bool)
        _flat(made).copy_(words.view(torch.uint8))  # whatever is not zero is true
        return made


class Positions(AbstractPacked):
    """Positions below a known bound, as narrower integers."""

    def __init__(self, positions: Tensor, narrow: torch.dtype) -> None:
        self._positions = positions.to(narrow)

    def unpacked(self) -> Tensor:
        """Make the positions again."""
        return self._positions.to(torch.int64)


class Draws(AbstractPacked):
    """Zeros and ones that were drawn into an empty tensor, and what they were scaled by."""

    def __init__(self, empty: Tensor) -> None:
        self._shape, self._stride, self._dtype = tuple(empty.shape), empty.stride(), empty.dtype
        self._mask: Tensor | None = None
        self._scalings: list[tuple[Any, tuple[Any, ...]]] = []

    def is_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Run an op on the result and note what it did; `False` if it is none that can be noted."""
        target = args[0]
        if tuple(target.shape) != self._shape or target.stride() != self._stride:
            return False
        if self._mask is None:
            if func._schema.name != _DRAWS:
                return False
            self._mask = _drawn(func, args, kwargs)
            return True
        if str(func) not in SCALED_BY or kwargs:
            return False
        func(*args)
        self._scalings.append((func, args[1:]))
        return True

    def unpacked(self) -> Tensor:
        """Scale the zeros and ones again, some at a time."""
        mask = self._mask
        assert mask is not None
        made = mask.new_empty_strided(self._shape, self._stride, dtype=self._dtype)
        values = _flat(made)
        step = UNPACKED_AT_ONCE if mask.device.type == "cpu" else mask.numel()
        for begin in range(0, mask.numel(), step):
            part = values[begin : begin + step]
            part.copy_(mask[begin : begin + step])
            for func, args in self._scalings:
                func(part, *args)
        return made


def packed_result(
    func: Any, args: tuple[Any, ...], made: Any
) -> tuple[Tensor, AbstractPacked] | None:
    """Return the result of an op that ran that can be kept packed, and its packed form.

    That of an empty tensor is to be told of what is drawn into it. `None` if there is none.
    """
    name = str(func)
    results = made if isinstance(made, (tuple, list)) else (made,)
    if name in EMPTY_OPS and _is_whole(results[0]) and results[0].is_floating_point():
        return results[0], Draws(results[0])
    for result in results:
        if not isinstance(result, Tensor) or not _is_whole(result):
            continue
        if result.dtype == torch.bool and result.numel() % 8 == 0:
            return result, Booleans(result)
        if name in POOLS and result.dtype == torch.int64:
            bound = args[0].shape[-POOLS[name] :].numel()
            width = next((width for most, width in NARROW if bound <= most), None)
            if width is not None:
                return result, Positions(result, _INTEGERS[width])
    return None


def _drawn(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Draw zeros and ones into a tensor; return them as one byte each."""
    target: Tensor = args[0]
    mask = target.new_empty((target.numel(),), dtype=torch.uint8)
    if _can_draw_bytes(func, target):
        # The same draws, and the conversion is the cheaper way round.
        func(mask.view(torch.bool), *args[1:], **kwargs)
        target.copy_(mask.view(target.shape))
    else:
        func(*args, **kwargs)
        mask.view(torch.bool).copy_(_flat(target))
    return mask


def _can_draw_bytes(func: Any, target: Tensor) -> bool:
    if isinstance(target, FakeTensor) or target.device.type != "cpu":
        return False
    is_scalar = func is torch.ops.aten.bernoulli_.float
    return is_scalar and target.is_contiguous() and _draws_alike(target.dtype)


def learn_draws() -> None:
    """Find out how this machine draws now: to ask first within a step would raise its peak."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        _draws_alike(dtype)


@functools.cache
def _draws_alike(dtype: torch.dtype) -> bool:
    """Whether booleans and numbers of a type are drawn alike from one random state, here."""
    with _disable_current_modes(), torch.no_grad():
        for number in (1, 4099, 100_003):
            one, other = (torch.Generator().manual_seed(number) for _ in range(2))
            numbers = torch.empty(number, dtype=dtype).bernoulli_(0.9, generator=one)
            booleans = torch.empty(number, dtype=torch.bool).bernoulli_(0.9, generator=other)
            is_same = torch.equal(numbers.bool(), booleans)
            if not is_same or not torch.equal(one.get_state(), other.get_state()):
                return False
    return True


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, each element once."""
    if not is_plain(tensor):
        return False
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return tensor.untyped_storage().nbytes() == filled * tensor.itemsize


def _flat(tensor: Tensor) -> Tensor:
    """View the memory of a tensor that fills it as one row."""
    return tensor.as_strided((tensor.numel(),), (1,))
