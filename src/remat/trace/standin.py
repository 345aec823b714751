"""Fake parameters, buffers and batches in the place of real ones, and everything put back after."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from remat.trace.generators import is_generator, put_state, state_of
from remat.trace.parallel import hidden_state
from remat.trace.values import SHADOW_LIMIT, set_value

# Any: modules hold, and batches are, whatever the user made them of.


class FakeFactory:
    """Make one fake tensor for each real one, keeping ties, views and small integer values.

    Tensors on the meta device become fake tensors on `device`: kernels choose their algorithm by
    device, and the meta device's choice (attention with all scores) is that of no real one.
    """

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self.mode = mode
        self.device = device
        self._memo: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # ids in the memo stay unique while their tensors live

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the fake for a tensor: the same one each time."""
        known = self._memo.get(id(tensor))
        if known is None:
            known = self._memo[id(tensor)] = self._make(tensor)
            self._kept.append(tensor)
        return known

    def note(self, tensor: Tensor, fake: Tensor) -> None:
        """Let a fake that was made elsewhere stand for a tensor."""
        self._memo[id(tensor)] = fake
        self._kept.append(tensor)

    def _make(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            device = self.device if tensor.device.type == "meta" else tensor.device
            with self.mode:
                plain = torch.empty_strided(
                    tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device=device
                )
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(plain, requires_grad=tensor.requires_grad)
            return plain.requires_grad_() if tensor.requires_grad else plain
        source = tensor if tensor.is_leaf else tensor.detach()
        fake = self.mode.from_tensor(source, static_shapes=True)
        if not tensor.is_floating_point() and tensor.numel() <= SHADOW_LIMIT:
            set_value(fake, tensor.detach().cpu().clone())
        return fake


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Copy nested lists, tuples and mappings with `function` applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, Mapping):
        mapped = {key: map_tensors(item, function) for key, item in value.items()}
        try:
            return type(value)(mapped)  # type: ignore[call-arg]
        except TypeError:
            return mapped
    return value


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back every attribute of every module, and the random state, whatever happens inside.

    And what FSDP2 keeps of the model outside of its modules.
    """
    modules = [*model.modules(), *hidden_state(model)]
    saved = [dict(module.__dict__) for module in modules]
    containers = [(c, c.copy()) for c in _containers(saved)]
    own = [
        (value, state_of(value))
        for attributes in saved
        for value in attributes.values()
        if is_generator(value)
    ]
    generators = random_states()
    try:
        yield
    finally:
        for module, attributes in zip(modules, saved, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, content in containers:
            _refill(container, content)
        for generator, state in own:
            put_state(generator, state)
        restore_random_states(generators)


def attribute_tensors(model: nn.Module) -> list[Tensor]:
    """List the tensors in plain attributes of modules: no parameters and no buffers."""
    found: list[Tensor] = []
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name not in _MODULE_TABLES:
                found.extend(t for t in _leaves(value, set()) if isinstance(t, Tensor))
    return found


def _containers(attributes: list[dict[str, Any]]) -> list[Any]:
    """List every list, dict and set that modules' attributes hold, each once."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    for table in attributes:
        for value in table.values():
            for item in _leaves(value, seen):
                if isinstance(item, (list, dict, set)):
                    found[id(item)] = item
    return list(found.values())


def _leaves(value: Any, seen: set[int]) -> Iterator[Any]:
    """Walk nested lists, tuples and dicts, containers included."""
    if isinstance(value, (list, tuple, dict, set)):
        if id(value) in seen:
            return
        seen.add(id(value))
        yield value
        items = value.values() if isinstance(value, dict) else value
        for item in items if not isinstance(value, set) else ():
            yield from _leaves(item, seen)
    elif isinstance(value, Tensor):
        yield value


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


def random_states() -> dict[str, Any]:
    """Take the state of every global random generator that is in use."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set every generator back to a state taken by `random_states`."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def swap_tensors(model: nn.Module, fake: FakeFactory) -> None:
    """Replace parameters, buffers and plain tensor attributes by fakes; `untouched` undoes it."""
    seen: set[int] = set()
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fake(tensor)  # type: ignore[assignment]
        for name, value in list(module.__dict__.items()):
            if name not in _MODULE_TABLES:
                module.__dict__[name] = _swapped(value, fake, seen)


_MODULE_TABLES = frozenset(nn.Module().__dict__)


def _swapped(value: Any, fake: FakeFactory, seen: set[int]) -> Any:
    """Swap the tensors in an attribute; lists and dicts stay the objects that modules share."""
    if isinstance(value, Tensor):
        return fake(value)
    if isinstance(value, tuple):
        items = [_swapped(item, fake, seen) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, (list, dict)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            swapped = _swapped(item, fake, seen)
            if swapped is not item:
                value[key] = swapped
    return value
