"""Runs: several consecutive module calls as one region, without a change to what calls them.

The first member's forward runs them all; the others then pass on what they are given. See
NOTE [ Runs ] in `remat.planner.chains` for when that gives the same values.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from remat.errors import ApplyError
from remat.trace.leaves import Nesting, flatten, unflatten

# Any: a module's arguments and results are the user's own.

HookTable = dict[int, Any]


@dataclass
class Run:
    """What the members of a run share.

    `argument` is the leaf of a member's arguments that takes leaf `result` of the result before.
    `pending` are the members that have run already and will be called to pass on, with how their
    results are nested.
    """

    members: tuple[nn.Module, ...]
    argument: int
    result: int
    is_running: bool = False
    pending: list[tuple[nn.Module, Nesting, list[Any]]] = field(default_factory=list)
    _output: weakref.ref[Tensor] | None = None
    _silent: list[_Silent] = field(default_factory=list)

    def begin(self) -> None:
        """Forget what an earlier step, broken off in the middle, has left."""
        self.pending.clear()
        self._output = None
        for hook in self._silent:
            hook.restore()
        self._silent.clear()

    def forward(self, first: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run every member in turn and return the last one's result in the first one's nesting."""
        pending: list[tuple[nn.Module, Nesting, list[Any]]] = []
        leaves, given = flatten((args, kwargs))
        output = self._with_hooks(args, kwargs, first(*args, **kwargs))
        results, nesting = flatten(output)
        value = results[self.result]
        results[self.result] = None
        self.is_running = True
        try:
            for member in self.members[1:]:
                leaves[self.argument] = value
                inner_args, inner_kwargs = unflatten(given, leaves)
                found, form = flatten(member(*inner_args, **inner_kwargs))
                value = found[self.result]
                found[self.result] = None
                pending.append((member, form, found))
        finally:
            self.is_running = False
        self.pending = pending
        self._output = weakref.ref(value)
        results[self.result] = value
        return unflatten(nesting, results)

    def pass_on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return, as a member's result, what it is given.

        Raises
        ------
        ApplyError: if the members are called in another order, or with something else, than when
            the plan was made.
        """
        member, nesting, results = self.pending[0]
        value = flatten((args, kwargs))[0][self.argument]
        if member is not module or self._output is None or self._output() is not value:
            self.begin()
            raise ApplyError(
                f"a run of {len(self.members)} {type(module).__name__} modules is recomputed as "
                "one, but between two of them the caller did something else than when the plan "
                "was made: make the plan again with remat.plan."
            )
        self.pending.pop(0)
        if not self.pending:
            self._output = None
        results[self.result] = value
        return unflatten(nesting, results)

    # -- hooks ------------------------------------------------------------------------------------

    def hook_tables(self) -> Iterator[HookTable]:
        """Yield the tables of hooks that fire inside the run instead of at its members' calls."""
        yield self.members[0]._forward_hooks
        for member in self.members[1:]:
            yield member._forward_pre_hooks
            yield member._forward_hooks

    def silence(self) -> None:
        """Keep the hooks that have fired inside the run from firing when the caller comes by."""
        for table in self.hook_tables():
            for key, hook in list(table.items()):
                table[key] = _Silent(table, key, hook)
                self._silent.append(table[key])

    def _with_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Let the first member's forward hooks see its own result, as `__call__` would."""
        first = self.members[0]
        for key, hook in list(first._forward_hooks.items()):
            if key in first._forward_hooks_with_kwargs:
                changed = hook(first, args, kwargs, output)
            else:
                changed = hook(first, args, output)
            output = output if changed is None else changed
        return output


class _Silent:
    """In place of a hook: does nothing once, and puts the hook back."""

    def __init__(self, table: HookTable, key: int, hook: Callable[..., Any]) -> None:
        self._table, self._key, self._hook = table, key, hook

    def __call__(self, *_: Any, **__: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the hook back, unless something else has taken its place."""
        if self._table.get(self._key) is self:
            self._table[self._key] = self._hook


@dataclass
class Follower:
    """A later member of a run; `replaced` is a forward that the instance already had."""

    run: Run
    replaced: Callable[..., Any] | None = None


def follower_forward(module: nn.Module, follower: Follower, *args: Any, **kwargs: Any) -> Any:
    """Run a member's forward inside its run, or pass on what it is given after it."""
    if follower.run.is_running or not follower.run.pending:
        forward = follower.replaced or functools.partial(type(module).forward, module)
        return forward(*args, **kwargs)
    return follower.run.pass_on(module, args, kwargs)


def with_tensors_first(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Return a function of the tensors in a call's arguments alone, and these tensors.

    Checkpointing keeps tensors that it is given by position as tensors saved for backward, which a
    region around drops; what is inside containers and keywords it would hold on to. A tensor that
    is given twice is passed once: run again, it is one object in both places as before.
    """
    leaves, nesting = flatten((args, kwargs))
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    unique = {id(leaves[i]): leaves[i] for i in places}
    number = {key: position for position, key in enumerate(unique)}
    sources = tuple((i, number[id(leaves[i])]) for i in places)
    for i in places:
        leaves[i] = None
    function = functools.partial(_call_with, forward, nesting, tuple(leaves), sources)
    return function, tuple(unique.values())


def gives_twice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is given one tensor by position and once more, as self-attention is."""
    given = [id(value) for value in args if isinstance(value, Tensor)]
    if not given:
        return False
    named = {id(value) for value in kwargs.values() if isinstance(value, Tensor)}
    return len(set(given)) < len(given) or not named.isdisjoint(given)


def _call_with(
    forward: Callable[..., Any],
    nesting: Nesting,
    leaves: tuple[Any, ...],
    sources: tuple[tuple[int, int], ...],
    *tensors: Tensor,
) -> Any:
    filled = list(leaves)
    for place, number in sources:
        filled[place] = tensors[number]
    args, kwargs = unflatten(nesting, filled)
    return forward(*args, **kwargs)
