"""Dropped results: single results of ops that backward makes again, op by op.

NOTE [ Dropping ]
Inside a call every op passes a dispatch mode, below autograd. Of those that the plan names it keeps
a note: the op, its arguments, and which of them are results of noted ops themselves. A tensor that
autograd saves and that lies in the memory of a noted result is let go of. When backward reads it,
the noted op runs again on the same arguments; see NOTE [ What dropping changes ] in
`remat.planner.dropping` for when, and how long what is held.

Whatever the plan says, the values are right or an error is raised: what runs again is what ran,
with the arguments that it had; a result that another op of the call writes to is no longer one and
is held, and an argument that is written to later is refused, as autograd refuses it.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remat.errors import ApplyError
from remat.regions.packing import AbstractPacked, Draws, learn_draws, packed_result
from remat.trace.ops import is_random, tensors_in, written_by
from remat.trace.records import EMPTY_OPS
from remat.trace.replaying import replaying
from remat.trace.saved import Kept, is_plain

# Size, stride and offset of a tensor in its memory.
_Geometry = tuple[tuple[int, ...], tuple[int, ...], int]

_EMPTY = torch.ops.aten.empty_strided.default

# What an op's arguments may nest in: the dispatcher makes them anew, of these very types.
_NESTS = frozenset({tuple, list, dict})

# Any: ops and their arguments are torch's own, without types.


class DroppedOps:
    """Which occurrences of which ops of a call are dropped, and of which the result is packed.

    Names are looked up once per op.
    """

    def __init__(
        self, named: frozenset[tuple[str, int]], packed: frozenset[tuple[str, int]] = frozenset()
    ) -> None:
        self._named, self._packed = named, packed
        if packed:
            learn_draws()
        self._by_op: dict[Any, tuple[Mapping[int, bool] | None, bool]] = {}

    def facts(self, op: Any) -> tuple[Mapping[int, bool] | None, bool]:
        """Return the named occurrences of an op, if any, and whether it may write to memory.

        Of each occurrence: whether its result is packed.
        """
        try:
            return self._by_op[op]
        except KeyError:
            name, schema = str(op), getattr(op, "_schema", None)
            found = {i: False for other, i in self._named if other == name}
            found |= {i: True for other, i in self._packed if other == name}
            known = found or None, schema is not None and schema.is_mutable
            self._by_op[op] = known
            return known

    def __reduce__(self) -> tuple[Any, ...]:
        return DroppedOps, (self._named, self._packed)


class _Result:
    """The memory of one dropped result: nothing, until it is made again."""

    __slots__ = ("__weakref__", "op", "place", "value")

    def __init__(self, op: _AbstractOp, place: int) -> None:
        self.op, self.place = op, place
        self.value: Tensor | None = None


class _View:
    """A tensor in the memory of a dropped result."""

    __slots__ = ("_geometry", "_result")

    def __init__(self, result: _Result, tensor: Tensor) -> None:
        self._result, self._geometry = result, _geometry(tensor)

    @property
    def missing_op(self) -> _AbstractOp | None:
        """The op that must run before this can be read."""
        return self._result.op if self._result.value is None else None

    def read(self) -> Tensor:
        """Return the tensor; its op runs again, unless it has."""
        missing = self.missing_op
        if missing is not None:
            _run_again(missing)
        value = self._result.value
        assert value is not None
        return _viewed(value, self._geometry)


@dataclass(slots=True)
class _Own:
    """In the arguments of a step: a tensor in the memory that an earlier step made."""

    place: int
    geometry: _Geometry


@dataclass(slots=True)
class _Step:
    """One op as it was called, with the random state that it began with if it draws."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: Tensor | None
    device: torch.device | None

    def run(self, change: Callable[[Any], Any]) -> Any:
        """Call it with its arguments read by `change`."""
        args, kwargs = _mapped(self.args, change), _mapped(self.kwargs, change)
        if self.random_state is None:
            return self.func(*args, **kwargs)
        present = _random_state(self.device)
        _set_random_state(self.random_state, self.device)
        try:
            return self.func(*args, **kwargs)
        finally:
            _set_random_state(present, self.device)


class _AbstractOp(ABC):
    """What brings results back: once, in the order of `number` among those that one read needs."""

    __slots__ = ("_results", "number")

    def __init__(self) -> None:
        self.number = 0
        self._results: list[tuple[int, weakref.ref[_Result]]] = []

    def result(self, place: int) -> _Result:
        """Stand for the memory of one result."""
        made = _Result(self, place)
        self._results.append((place, weakref.ref(made)))
        return made

    @abstractmethod
    def missing(self) -> list[_AbstractOp]:
        """Return the ops that must run before."""

    @abstractmethod
    def run(self) -> None:
        """Bring the results back."""

    def _give(self, values: Sequence[Tensor]) -> None:
        for place, reference in self._results:
            result = reference()
            if result is not None:
                result.value = values[place]


class _PackedOp(_AbstractOp):
    """An op of which one result is kept packed."""

    __slots__ = ("_packed",)

    def __init__(self, packed: AbstractPacked) -> None:
        super().__init__()
        self._packed: AbstractPacked | None = packed

    def missing(self) -> list[_AbstractOp]:
        """Return nothing: all that is needed is kept."""
        return []

    def run(self) -> None:
        """Unpack."""
        packed, self._packed = self._packed, None
        assert packed is not None
        self._give((packed.unpacked(),))


class _Op(_AbstractOp):
    """An op that ran, with those that wrote to its result; they run once more as they ran."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[_Step] = []

    def add(self, step: _Step, number: int) -> None:
        """Note what ran; where it wrote to the result, after what had made it."""
        self._steps.append(step)
        self.number = number

    def missing(self) -> list[_AbstractOp]:
        """Return the ops that made what this one reads."""
        return [
            missing
            for step in self._steps
            for leaf in _leaves((*step.args, *step.kwargs.values()))
            if type(leaf) is _View and (missing := leaf.missing_op) is not None
        ]

    def run(self) -> None:
        """Run it again."""
        steps, self._steps = self._steps, []
        made = steps.pop(0).run(_read)
        values = made if isinstance(made, (tuple, list)) else (made,)
        for step in steps:
            step.run(lambda leaf: _read_own(leaf, values))
        self._give(values)


def _run_again(op: _AbstractOp) -> None:
    """Run an op again, after those that it needs, in the order in which they ran."""
    with replaying():
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            with torch.no_grad(), _without_autocast():
                _run_needed(op)
        else:
            _run_needed(op)


def _run_needed(op: _AbstractOp) -> None:
    missing = op.missing()
    if not missing:
        op.run()
        return
    needed = {op.number: op}
    while missing:
        other = missing.pop()
        if other.number not in needed:
            needed[other.number] = other
            missing += other.missing()
    for number in sorted(needed):
        needed.pop(number).run()


class Dropping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run one call with the results of some ops dropped; see NOTE [ Dropping ].

    Arguments
    ---------
    on_read: called when backward reads a saved tensor.
    """

    supports_higher_order_operators = True

    def __init__(self, dropped: DroppedOps, on_read: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dropped, self._on_read = dropped, on_read
        self._counts: dict[Any, int] = {}
        self._number = 0
        # address of a storage -> the storage, while it lives, and what stands for it
        self._known: dict[int, tuple[weakref.ref[Any], _Result]] = {}
        # the same of memory that was taken to draw zeros and ones into, and what packs them
        self._empty: dict[int, tuple[weakref.ref[Any], Draws]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Drop inside."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack), self:
                yield
        finally:
            self._known.clear()
            self._empty.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        occurrences, may_write = self._dropped.facts(func)
        if occurrences is not None:
            occurrence = self._counts.get(func, 0)
            self._counts[func] = occurrence + 1
            if occurrence in occurrences:
                run = self._run_packed if occurrences[occurrence] else self._run
                return run(func, args, kwargs)
        if may_write:
            self._forget(func, args, kwargs)
        return func(*args, **kwargs)

    def _forget(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold what an op is about to write to, like any other tensor."""
        for tensor in written_by(func, args, kwargs):
            self._known.pop(tensor.untyped_storage()._cdata, None)
            self._empty.pop(tensor.untyped_storage()._cdata, None)

    def _run_packed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op whose result is kept packed, or one that draws into such a result."""
        if func._schema.is_mutable:
            return self._write_packed(func, args, kwargs)
        made = func(*args, **kwargs)
        found = packed_result(func, args, made)
        if found is not None:
            tensor, packed = found
            storage = tensor.untyped_storage()
            if isinstance(packed, Draws):
                self._empty[storage._cdata] = weakref.ref(storage), packed
            else:
                self._note_packed(storage, packed)
        return made

    def _write_packed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        storage = args[0].untyped_storage()
        known = self._empty.get(storage._cdata)
        if known is None or known[0]() is None or not known[1].is_written(func, args, kwargs):
            self._forget(func, args, kwargs)
            return func(*args, **kwargs)
        if self._find(args[0]) is None:  # an address may have been that of a dead one
            self._note_packed(storage, known[1])
        return args[0]

    def _note_packed(self, storage: Any, packed: AbstractPacked) -> None:
        op = _PackedOp(packed)
        self._number += 1
        op.number = self._number
        self._known[storage._cdata] = weakref.ref(storage), op.result(0)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op whose result is dropped, and note how."""
        written = written_by(func, args, kwargs)
        hosts = [result for tensor in written if (result := self._find(tensor)) is not None]
        op = hosts[0].op if hosts else _Op()
        if not isinstance(op, _Op):  # a packed result that the plan did not mean to be written to
            self._forget(func, args, kwargs)
            return func(*args, **kwargs)
        copies = {
            id(tensor): tensor.clone() for tensor in written if self._find(tensor) is None
        }  # fmt: skip

        def note(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            result = self._find(leaf)
            if result is None:
                return _kept(copies.get(id(leaf), leaf))
            if result.op is op:
                return _Own(result.place, _geometry(leaf))
            return _View(result, leaf)

        device = _device_drawn_on(func, args, kwargs)
        state = None if device is None else _random_state(device)
        if str(func) in EMPTY_OPS:  # of what it is given, it uses the shape
            made = func(*args, **kwargs)
            step = _Step(_EMPTY, _geometry(made)[:2], _kind(made), None, None)
        else:
            step = _Step(func, _mapped(args, note), _mapped(kwargs, note), state, device)
            made = func(*args, **kwargs)
        self._number += 1
        op.add(step, self._number)
        if not hosts:
            for place, tensor in enumerate(made if isinstance(made, (tuple, list)) else (made,)):
                if isinstance(tensor, Tensor) and is_plain(tensor):
                    storage = tensor.untyped_storage()
                    self._known[storage._cdata] = weakref.ref(storage), op.result(place)
        return made

    def _find(self, tensor: Tensor) -> _Result | None:
        """Return the dropped result in whose memory a tensor lies, as its op left it."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        return None if known is None or known[0]() is None else known[1]

    def _pack(self, tensor: Tensor) -> Kept | _View:
        result = self._find(tensor)
        if result is not None:
            return _View(result, tensor)
        if type(tensor) is not Tensor:
            return Kept(tensor)
        # Past every mode: nobody needs to see a tensor kept as autograd keeps it.
        with torch._C._DisableTorchDispatch():
            return Kept(tensor)

    def _unpack(self, packed: Kept | _View) -> Tensor:
        self._on_read()
        return packed.read()


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "device": tensor.device}


def _kept(tensor: Tensor) -> Kept:
    # Below autograd a detached tensor would count its versions by itself.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return Kept(tensor)


def _read(leaf: Any) -> Any:
    if isinstance(leaf, _View):
        return leaf.read()
    if isinstance(leaf, Kept):
        if leaf.tensor._version != leaf.version:
            raise ApplyError(
                "a tensor that a dropped result is made from was written to after its forward and "
                "before its backward: it cannot be made again. Write to it after backward, or take "
                "the plan off with handle.remove()."
            )
        return leaf.tensor
    return leaf


def _read_own(leaf: Any, values: Sequence[Tensor]) -> Any:
    return _viewed(values[leaf.place], leaf.geometry) if isinstance(leaf, _Own) else _read(leaf)


def _geometry(tensor: Tensor) -> _Geometry:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _viewed(value: Tensor, geometry: _Geometry) -> Tensor:
    return value if _geometry(value) == geometry else value.as_strided(*geometry)


def _device_drawn_on(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.device | None:
    """Return the device whose generator an op draws from, `None` if it draws nothing."""
    if not is_random(func, args, kwargs):
        return None
    return next((t.device for t in tensors_in((args, kwargs))), torch.device("cpu"))


def _random_state(device: torch.device | None) -> Tensor:
    if device is not None and device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _mapped(values: Any, change: Callable[[Any], Any]) -> Any:
    """Change the leaves of an op's arguments: tuples, lists and mappings of anything."""
    if isinstance(values, dict):
        return {
            key: _mapped(v, change) if type(v) in _NESTS else change(v) for key, v in values.items()
        }
    return type(values)([_mapped(v, change) if type(v) in _NESTS else change(v) for v in values])


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if type(value) in _NESTS:
            yield from _leaves(value.values() if isinstance(value, dict) else value)
        else:
            yield value


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Run ops as they are: what autocast did to their arguments were ops as well."""
    kinds = [k for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)
