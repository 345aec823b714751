"""Trials: a module whole and in slices, compared before a plan relies on slices.

A trace of the whole cannot tell a constant from what a module makes of its shape: a mean by hand, a
branch on the number of rows, a gradient that is scaled or clipped. So the module runs both ways:
always on fake tensors, where its ops must be alike, and on random numbers where it has real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from remat.rewriting.token_wise import COPIES, is_pointwise
from remat.trace.standin import FakeFactory, swap_tensors, untouched

# Any: ops and their arguments are torch's own.

_CANCELLED = 64.0  # rounding of what cancels, in units of the largest of what was compared


def gradients(
    results: Any, wanted: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor | None]:
    """Return the gradients of results, summed with random weights."""
    reached = [r for r in tree_leaves(results) if isinstance(r, Tensor) and r.requires_grad]
    by = [
        torch.randn(r.shape, generator=generator, dtype=torch.float32).to(r.device, r.dtype)
        for r in reached
    ]
    return list(torch.autograd.grad(reached, wanted, by, allow_unused=True))


def are_close(
    ones: Sequence[Tensor | None], others: Sequence[Tensor | None], tolerance: float
) -> bool:
    """Whether tensors differ by no more than a share of their largest value, and rounding."""
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if a is not None or b is not None]
    if any(a is None or b is None or a.shape != b.shape for a, b in pairs):
        return False
    most = [float(a.abs().max()) if a is not None and a.numel() else 0.0 for a, _ in pairs]
    for (a, b), size in zip(pairs, most, strict=True):
        assert a is not None
        assert b is not None
        allowed = tolerance * size + _CANCELLED * torch.finfo(a.dtype).eps * max(most)
        if a.numel() and not bool((a - b).abs().max() <= allowed):
            return False
    return True


def are_same(ones: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether tensors are the same bits."""
    pairs = zip(ones, others, strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def runs_alike(module: nn.Module, whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether a module runs the same ops on each part as on the whole, forward and backward.

    Arguments
    ---------
    whole, parts: its one argument, of which only shape, dtype and device are read.
    """
    expected, *found = [_ops_of(module, given) for given in (whole, *parts)]
    return all(ops == expected for ops in found)


class _Listing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down every op that computes something, with the numbers that decide what."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name.rpartition(".")[0] not in COPIES and not func.is_view:
            self.ops.append((name, _numbers(name, tree_leaves((args, kwargs)))))
        return func(*args, **kwargs)


def _numbers(name: str, leaves: list[Any]) -> str:
    """Write down the numbers of an op that works on each element, or makes a constant."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    constants = [t.tolist() for t in tensors if not isinstance(t, FakeTensor) and t.numel() == 1]
    if tensors and not is_pointwise(name):
        return repr(constants)
    return repr([*constants, *(leaf for leaf in leaves if not isinstance(leaf, Tensor))])


def _ops_of(module: nn.Module, given: Tensor) -> list[tuple[str, str]]:
    mode, listing = FakeTensorMode(allow_non_fake_inputs=True), _Listing()
    factory = FakeFactory(mode, torch.device("cpu"))
    with untouched(module), mode, torch.enable_grad():
        swap_tensors(module, factory)
        device = next((p.device for p in module.parameters()), given.device)
        x = torch.zeros(given.shape, dtype=given.dtype, device=device).requires_grad_()
        trained = [p for p in module.parameters() if p.requires_grad]
        with listing:
            result = module.forward(x)
            torch.autograd.grad(result, [x, *trained], torch.ones_like(result), allow_unused=True)
    return listing.ops
