"""One request: how a workload calls its model to predict, at any number of examples."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from remat.errors import WorkloadError
from remat.trace.step import default_loss
from remat.workload import Batch, Workload

# Any: arguments and results of the user's model.


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Arguments of one call of the model; tensors of `num_examples` rows can be made fewer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_examples: int

    def tensors(self) -> list[Tensor]:
        """List the tensors among the arguments, in order."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def of(self, number: int) -> Request:
        """Return a request of so many examples: the first ones, from the start again if need be."""

        def resized(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not self.counts_examples(leaf):
                return leaf
            rows = torch.arange(number, device=leaf.device) % self.num_examples
            return leaf[rows].contiguous()

        args, kwargs = tree_map(resized, (self.args, self.kwargs))
        return Request(args=args, kwargs=kwargs, num_examples=number)

    def counts_examples(self, tensor: Tensor) -> bool:
        """Whether a tensor's first dimension counts examples: it is as long as the first one's."""
        return tensor.dim() > 0 and tensor.shape[0] == self.num_examples

    def send(self, model: nn.Module) -> Any:
        """Let the model answer, without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)


def observe_request(workload: Workload, model: nn.Module, batch: Batch) -> Request:
    """Run the workload's prediction (or else its loss) once, and note how the model was called.

    Raises
    ------
    WorkloadError: if the model was not called, or no argument has a first dimension.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hook = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            if workload.predict is not None:
                workload.predict(model, batch)
            else:
                (workload.loss or default_loss)(model, batch)
    finally:
        hook.remove()
    if not calls:
        raise WorkloadError("predicting does not call the model itself, so no request is known.")
    args, kwargs = calls[0]
    sizes = [
        x.shape[0] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0
    ]
    if not sizes or sizes[0] < 1:
        raise WorkloadError("the model is called without a tensor that counts examples.")
    return Request(args=args, kwargs=dict(kwargs), num_examples=sizes[0])


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model but not its parameters and buffers, which both then hold."""
    kept = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def largest_difference(left: Any, right: Any) -> float:
    """Return the largest absolute difference of two answers' floating tensors, in order."""
    pairs = zip(_floats(left), _floats(right), strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)


def count_ops(function: Callable[[], object]) -> Counter[str]:
    """Count by name the ops that a function dispatches in torch."""
    with _counting() as counts:
        function()
    return counts


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    mode = _CountingMode()
    with mode:
        yield mode.counts


class _CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts ops and runs them as they are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _floats(answer: Any) -> list[Tensor]:
    leaves = [x for x in tree_leaves(answer) if isinstance(x, Tensor)]
    return [x.detach().cpu() for x in leaves if x.is_floating_point() and x.numel()]
