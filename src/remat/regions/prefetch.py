"""Prefetch: what waits on the host is fetched when backward comes to a call before its own.

NOTE [ Entered ]
1. A module call is entered when backward comes to the node of autograd's graph that made its
   result. Regions leave that graph as it is, so that the moment is the same whether the call, or
   one around it, is recomputed, offloaded or neither.
2. What a call has sent to the host waits on the plan's board until the call that is entered before
   it has run forward: so each is tied to the same forward of its model, however many there are.
3. It is fetched once, in the first backward that comes by; in another one over a retained graph, it
   is fetched when it is read.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from remat.regions.offload import Board, Copy, Key
from remat.regions.runtime import RegionRuntime, is_recomputing
from remat.trace.ops import nodes_in

# Any: a module's arguments and results are the user's own.


@dataclass
class Entered:
    """A module at whose calls others' tensors are fetched; `fetches` says whose at which call.

    `counter` tells the calls apart; `replaced` is a forward that the instance already had.
    """

    counter: RegionRuntime
    fetches: dict[int, tuple[Key, ...]]
    board: Board
    replaced: Callable[..., Any] | None

    def watch(self, call: int, output: Any) -> None:
        """Fetch, when backward comes to a result, what waits for it."""
        copies = [copy for key in self.fetches[call] for copy in self.board.take(key)]
        if copies:
            for node in nodes_in(output):
                node.register_prehook(functools.partial(_fetch_once, copies))


def entered_forward(module: Any, entered: Entered, *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward, and watch for backward to come to its result."""
    forward = entered.replaced or functools.partial(type(module).forward, module)
    if torch.compiler.is_compiling() or is_recomputing() or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    call = entered.counter.selected_call()
    output = forward(*args, **kwargs)
    if call is not None:
        entered.watch(call, output)
    return output


def _fetch_once(copies: list[weakref.ref[Copy]], _gradients: Any) -> None:
    while copies:
        copy = copies.pop(0)()
        if copy is not None:
            copy.fetch()
