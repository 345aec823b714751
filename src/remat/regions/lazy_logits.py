"""Logits that are not computed until something needs them, and in slices where only a loss does.

NOTE [ Lazy logits ]
1. A sliced head returns a tensor of the logits' shape and type without memory. What real code does
   between a head and its loss (casts, views of the rows, transposition) is done to the hidden
   states instead, or noted.
2. `F.cross_entropy` of such a tensor runs in slices. Anything else gets the real logits: from then
   on, every lazy tensor of that call of the head stands for its real one, in-place ops included.
3. Real logits are computed from what the head was called with. Where that was written to since,
   the result would be another: refused.
4. The tensor is part of autograd's graph, so that code below torch's Python functions
   differentiates through it as well.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  as everyone writes it
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from remat.errors import ApplyError
from remat.regions.lazy_rules import QUERIES, RULES, Form

# Any: torch hands over functions and arguments of every kind.

_log = logging.getLogger(__name__)


@dataclass
class SlicedHead:
    """A module whose logits wait for their loss; what it has to warn of is said once."""

    name: str
    num_slices: int
    has_warned: bool = False


class HeadCall:
    """One call of a sliced head: what its logits follow from, and the lazy tensors made of it."""

    def __init__(
        self, head: SlicedHead, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        self.head = head
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.head_dtype: torch.dtype | None = None
        if torch.is_autocast_enabled(hidden.device.type):
            self.head_dtype = torch.get_autocast_dtype(hidden.device.type)
        self.is_real = False
        self._members: list[weakref.ref[LazyLogits]] = []
        self._versions = self._present_versions()

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the logits as the module does."""
        kind = hidden.device.type
        with torch.autocast(kind, dtype=self.head_dtype, enabled=self.head_dtype is not None):
            return F.linear(hidden, weight, bias)

    def join(self, member: LazyLogits) -> None:
        """Note a lazy tensor that becomes real together with the others."""
        self._members.append(weakref.ref(member))

    def make_real(self, reason: str) -> None:
        """Compute the logits, and with them every lazy tensor that is alive; Rule 2."""
        self.check_unchanged()
        self.is_real = True
        if not (self.head.has_warned or isinstance(self.hidden, FakeTensor)):
            self.head.has_warned = True
            _log.warning(
                "the logits of %r were needed by %s: they were computed whole, not in slices.",
                self.head.name, reason,
            )  # fmt: skip
        for reference in self._members:
            member = reference()
            if member is not None:
                member.whole()

    def check_unchanged(self) -> None:
        """Refuse to compute logits from what has been written to since the call; Rule 3."""
        if self._versions != self._present_versions():
            raise ApplyError(
                f"the logits of {self.head.name!r} are needed after its input or weight was "
                "changed in place (by an optimizer step, for example), and with this plan they are "
                "computed only now: read them earlier, or plan with chunks=False."
            )

    def _present_versions(self) -> list[int]:
        tensors = (self.hidden, self.weight, self.bias)
        return [t._version for t in tensors if t is not None]


@dataclass(frozen=True, slots=True)
class _Step:
    """One function that was called on a lazy tensor, to be called on the real one."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, logits: Tensor) -> Tensor:
        return self.func(logits, *self.args, **self.kwargs)


class _Connect(torch.autograd.Function):
    """Make the lazy tensor, and differentiate through it where something below Python reads it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: HeadCall,
        steps: tuple[_Step, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.call, ctx.steps, ctx.inputs = call, steps, (hidden, weight, bias)
        return Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call.check_unchanged()
        needed = ctx.needs_input_grad[:3]
        leaves = [None if t is None else t.detach() for t in ctx.inputs]
        with torch.enable_grad():
            for leaf, is_needed in zip(leaves, needed, strict=True):
                if leaf is not None and is_needed:
                    leaf.requires_grad_()
            logits = ctx.call.logits(*leaves)
            for step in ctx.steps:
                logits = step(logits)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(logits, wanted, gradient))
        return (*(next(found) if is_needed else None for is_needed in needed), *(None,) * 4)


class LazyLogits(Tensor):
    """The logits of a sliced head; see NOTE [ Lazy logits ]."""

    call: HeadCall
    form: Form
    parent: LazyLogits | None
    step: _Step | None
    _whole: Tensor | None

    @staticmethod
    def of(
        call: HeadCall,
        form: Form,
        parent: LazyLogits | None = None,
        step: _Step | None = None,
    ) -> LazyLogits:
        """Make the lazy tensor of a head's call, or of one more step from another one."""
        shape = form.shape(call.weight.shape[0])
        dtype = form.casts[-1] if form.casts else call.head_dtype or call.hidden.dtype
        steps: tuple[_Step, ...] = ()
        if parent is not None and step is not None:
            steps = (*parent.steps(), step)
        made: LazyLogits = _Connect.apply(  # type: ignore[no-untyped-call]
            call.hidden, call.weight, call.bias, call, steps, shape, dtype
        )
        made.call, made.form, made.parent, made.step, made._whole = call, form, parent, step, None
        call.join(made)
        return made

    def steps(self) -> tuple[_Step, ...]:
        """Return what was done to the head's own logits to come here, in order."""
        if self.parent is None or self.step is None:
            return ()
        return (*self.parent.steps(), self.step)

    def whole(self) -> Tensor:
        """Return the real tensor, once the call's logits are needed."""
        if self._whole is None:
            with torch.enable_grad():
                if self.parent is None or self.step is None:
                    call = self.call
                    self._whole = call.logits(call.hidden, call.weight, call.bias)
                else:
                    self._whole = self.step(self.parent.whole())
        return self._whole

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and not first.call.is_real:
            if func in QUERIES:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            rule = RULES.get(func)
            if rule is not None and torch.is_grad_enabled():
                result = rule(first, *args[1:], **kwargs)
                if isinstance(result, Form):
                    # Rule 1: the step is noted, for the case that the real logits are needed.
                    step = _Step(func, args[1:], kwargs)
                    return LazyLogits.of(first.call, result, first, step)
                if result is not None:
                    return result
        args, kwargs = _all_real((args, kwargs), getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Below autograd, which differentiates through `_Connect`; Rule 4.
        args, kwargs = _all_real((args, kwargs or {}), str(func))
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Name the tensors that this one holds: torch's protocol for subclasses like this one."""
        return (["_whole"] if self._whole is not None else ["_hidden", "_weight"]), None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Tensor:
        """Stand for the real logits: a lazy tensor is never rebuilt from its parts."""
        raise ApplyError("lazy logits cannot be rebuilt: plan with chunks=False.")

    @property
    def _hidden(self) -> Tensor:
        return self.form.hidden

    @property
    def _weight(self) -> Tensor:
        return self.call.weight


def _all_real(value: Any, reason: str) -> Any:
    def real(lazy: LazyLogits) -> Tensor:
        if not lazy.call.is_real:
            lazy.call.make_real(reason)
        return lazy.whole()

    return tree_map_only(LazyLogits, real, value)


def lazy_logits(head: SlicedHead, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits `hidden @ weight.T + bias`, not computed yet.

    Example
    -------
    ```python
    logits = lazy_logits(SlicedHead("lm_head", 8), hidden, head.weight, head.bias)
    loss = F.cross_entropy(logits.view(-1, classes), labels.view(-1))  # in eight slices
    ```
    """
    return LazyLogits.of(HeadCall(head, hidden, weight, bias), Form(hidden))
