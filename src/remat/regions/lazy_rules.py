"""What stays lazy of a sliced head's logits: casts, views of rows, and the loss itself.

Each rule returns what the result stands for, or `None` where it needs the real logits; see
NOTE [ Lazy logits ] in `remat.regions.lazy_logits`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812  as everyone writes it
from torch import Tensor

from remat.regions.sliced_loss import SlicedLoss

if TYPE_CHECKING:
    from remat.regions.lazy_logits import LazyLogits

# Any: torch hands over arguments of every kind.


@dataclass(frozen=True, slots=True)
class Form:
    """What a lazy tensor stands for: rows of hidden states, then casts, then where classes lie.

    The classes are the last dimension, or the second where `is_class_second`, as
    `F.cross_entropy` wants them.
    """

    hidden: Tensor
    casts: tuple[torch.dtype, ...] = ()
    is_class_second: bool = False

    def shape(self, num_classes: int) -> tuple[int, ...]:
        """Return the logits' shape."""
        rows = tuple(self.hidden.shape[:-1])
        if self.is_class_second:
            return (rows[0], num_classes, *rows[1:])
        return (*rows, num_classes)


def _cast(lazy: LazyLogits, dtype: torch.dtype) -> Form | None:
    form = lazy.form
    if not dtype.is_floating_point:
        return None
    casts = form.casts if dtype == lazy.dtype else (*form.casts, dtype)
    return Form(form.hidden, casts, form.is_class_second)


def _to(lazy: LazyLogits, *args: Any, **kwargs: Any) -> Form | None:
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return None
    if memory_format is not None or device not in (None, lazy.device):
        return None
    return _cast(lazy, dtype or lazy.dtype)


def _type(lazy: LazyLogits, dtype: Any = None, **kwargs: Any) -> Form | None:
    return _cast(lazy, dtype) if isinstance(dtype, torch.dtype) and not kwargs else None


def _same(lazy: LazyLogits, **kwargs: Any) -> Form | None:
    return None if kwargs else lazy.form


def _reshape(lazy: LazyLogits, *shape: Any, **kwargs: Any) -> Form | None:
    form = lazy.form
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    classes = lazy.call.weight.shape[0]
    if kwargs or form.is_class_second or not shape or not all(isinstance(s, int) for s in shape):
        return None
    sizes = list(shape)
    if sizes[-1] == -1 and -1 not in sizes[:-1]:
        sizes[-1] = classes
    if sizes[-1] != classes:
        return None
    try:
        hidden = form.hidden.reshape(*sizes[:-1], form.hidden.shape[-1])
    except RuntimeError:  # another number of elements: the real logits say so in torch's words
        return None
    return Form(hidden, form.casts)


def _flatten(lazy: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Form | None:
    form, last = lazy.form, lazy.dim() - 1
    end = end_dim + lazy.dim() if end_dim < 0 else end_dim
    if form.is_class_second or end >= last:
        return None
    return Form(form.hidden.flatten(start_dim, end), form.casts)


def _index(lazy: LazyLogits, index: Any) -> Form | None:
    """Select rows: the index must leave the classes, the last dimension, as they are."""
    form = lazy.form
    items = index if isinstance(index, tuple) else (index,)
    if form.is_class_second or any(isinstance(item, list) for item in items):
        return None
    taken, has_ellipsis = 0, False
    for item in items:
        if item is Ellipsis:
            has_ellipsis = True
        elif isinstance(item, Tensor) and item.dtype == torch.bool:
            taken += item.dim()
        elif item is not None:
            taken += 1
    reaches_classes = taken >= lazy.dim() or (has_ellipsis and items[-1] is not Ellipsis)
    is_whole = isinstance(items[-1], slice) and items[-1] == slice(None)
    if reaches_classes and not is_whole:
        return None
    return Form(form.hidden[index], form.casts)


def _permute(lazy: LazyLogits, *dims: Any, **kwargs: Any) -> Form | None:
    """Move the classes from the last dimension to the second, or back."""
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    count, form = lazy.dim(), lazy.form
    if kwargs or count < 3 or len(dims) != count:
        return None
    order = [d % count for d in dims]
    to_second = [0, count - 1, *range(1, count - 1)]
    to_last = [0, *range(2, count), 1]
    if order == (to_last if form.is_class_second else to_second):
        return Form(form.hidden, form.casts, not form.is_class_second)
    return None


def _transpose(lazy: LazyLogits, dim0: int, dim1: int) -> Form | None:
    order = list(range(lazy.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(lazy, *order)


def _cross_entropy(
    lazy: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    form, call = lazy.form, lazy.call
    kind = lazy.device.type
    casts, dtype = form.casts, lazy.dtype
    if torch.is_autocast_enabled(kind) and dtype in (torch.bfloat16, torch.float16):
        casts = (*casts, torch.float32)  # as autocast does for this loss
    is_class_at_its_place = form.is_class_second or lazy.dim() <= 2
    fits = (
        isinstance(target, Tensor)
        and target.dtype == torch.int64
        and target.shape == form.hidden.shape[:-1]
        and target.device == lazy.device
        and is_class_at_its_place
    )
    plain = size_average is None and reduce is None and reduction in ("mean", "sum")
    # Half precision's range is small: gradients must be scaled before, not after, they are rounded.
    is_half = torch.float16 in (call.head_dtype, call.hidden.dtype, *casts)
    if not fits or not plain or is_half or (weight is not None and weight.requires_grad):
        return None
    call.check_unchanged()
    how = SlicedLoss(
        num_slices=call.head.num_slices, head_dtype=call.head_dtype, casts=casts,
        ignore_index=ignore_index, is_mean=reduction == "mean",
        label_smoothing=float(label_smoothing),
    )  # fmt: skip
    hidden = form.hidden.reshape(-1, form.hidden.shape[-1])
    return how(hidden, call.weight, call.bias, target.reshape(-1), weight)


def _getters() -> Iterator[Any]:
    names = (
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf",
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn",
        "itemsize", "names", "_version",
    )  # fmt: skip
    for name in names:
        with contextlib.suppress(AttributeError):
            yield getattr(Tensor, name).__get__


QUERIES = frozenset(
    {
        *_getters(), Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement,
        Tensor.stride, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous,
        Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.is_inference,
        torch.is_floating_point, torch.numel, torch.is_complex, torch.is_inference,
    }
)  # fmt: skip

RULES: dict[Any, Callable[..., Form | Tensor | None]] = {
    Tensor.float: lambda lazy, **kw: None if kw else _cast(lazy, torch.float32),
    Tensor.double: lambda lazy, **kw: None if kw else _cast(lazy, torch.float64),
    Tensor.bfloat16: lambda lazy, **kw: None if kw else _cast(lazy, torch.bfloat16),
    Tensor.to: _to,
    Tensor.type: _type,
    Tensor.contiguous: _same,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.__getitem__: _index,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.permute: _permute,
    torch.permute: _permute,
    F.cross_entropy: _cross_entropy,
}
