"""Values that a region saves, sampled when it first runs and compared when it runs again.

NOTE [ Values that come back different ]
What a module reads is known from the trace of one step, and what is known to change is kept. No
trace can see what changes outside of it: a global variable, a clock, a file, a tensor put on an
attribute between two forwards. Then the region runs again without an error, on other values, and
torch's checkpoint, which compares shapes and dtypes, says nothing. So the first steps, and a few of
every thousand after, take a sample of each tensor that a region saves. It lies on a diagonal,
allocates nothing, and waits for the device, which is why it is not taken in every step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import Self

from remat.errors import ApplyError

_log = logging.getLogger(__name__)
_thread = threading.local()

# The name under which torch's checkpoint finds our comparison.
DETERMINISM_CHECK = "remat"
# Of so many forwards of a region the first ones are looked at.
PERIOD, LOOKS = 1024, 2
_SAMPLES = 32


def called(module: nn.Module, name: str) -> str:
    """Return what errors call a recomputed module: its class, and its name in the model."""
    return f"{type(module).__name__} {name!r}"


class Recall:
    """Which region saves tensors now: a context around its first run.

    `buffers` are (module, name) pairs that the region updates; what is saved of them is compared
    after the update, and not looked at.
    """

    __slots__ = ("_before", "_gathered", "name", "updated")

    def __init__(self, name: str, buffers: tuple[tuple[nn.Module, str], ...]) -> None:
        self.name = name
        self._gathered: dict[str, str] | None = getattr(_thread, "gathered", None)
        self.updated = {_storage_of(module._buffers[key]) for module, key in buffers}

    def __enter__(self) -> Self:
        self._before = getattr(_thread, "region", None)
        _thread.region = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.region = self._before

    def tell(self, change: str, device: torch.device) -> None:
        """Say that the region came back with other values, as loudly as is right."""
        message = (
            f"{self.name} ran again in backward on other values than in its forward ({change}): "
            "its gradients are wrong. It reads what changed in between, such as a global variable, "
            "an attribute, a clock or a file: change that after backward, or take the plan off "
            "with handle.remove()."
        )
        if device.type != "cpu":
            _log.warning("%s", message)
        elif self._gathered is None:
            raise ApplyError(message)
        else:
            self._gathered.setdefault(self.name, change)


@contextlib.contextmanager
def gathered() -> Iterator[dict[str, str]]:
    """Gather what changed, by region, of forwards in here, in place of the error that it is."""
    before = getattr(_thread, "gathered", None)
    _thread.gathered = {}
    try:
        yield _thread.gathered
    finally:
        _thread.gathered = before


class Seen:
    """A saved tensor's form, and a sample of its values where it holds any that can be compared."""

    __slots__ = ("form", "region", "sample", "tolerance")

    def __init__(self, tensor: Tensor) -> None:
        self.form = (tensor.shape, tensor.dtype, tensor.device)
        self.region: Recall | None = getattr(_thread, "region", None)
        self.sample: list[Any] | None = None
        self.tolerance = 0.0
        updated = set() if self.region is None else self.region.updated
        if _has_values(tensor) and _storage_of(tensor) not in updated:
            self.sample = _diagonal(tensor)
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                self.tolerance = math.sqrt(torch.finfo(tensor.dtype).eps)

    def __eq__(self, other: object) -> bool:
        """Compare form and values.

        Raises
        ------
        ApplyError: where values differ by more than rounding, on the CPU; elsewhere, where a kernel
            may leave memory of its own unset, that is a warning.
        """
        if not isinstance(other, Seen) or self.form != other.form:
            return False
        if self.sample is None or other.sample is None or self.region is None:
            return True
        sizes = filter(math.isfinite, map(abs, self.sample))
        allowed = self.tolerance * max(sizes, default=0)
        for was, now in zip(self.sample, other.sample, strict=True):
            if was == now or (was != was and now != now) or abs(was - now) <= allowed:
                continue
            change = f"{was:.6g} became {now:.6g} in a saved tensor, {self!r}"
            self.region.tell(change, self.form[2])
            break
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shape, dtype, device = self.form
        return f"{dtype} {tuple(shape)} on {device}"


def _storage_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.untyped_storage()._cdata


def _has_values(tensor: Tensor) -> bool:
    # While a step is simulated, real tensors stand for nothing. uint8 is what kernels take for
    # workspace, parts of which they leave unset.
    return (
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel() > 0
        and tensor.dtype.itemsize >= (2 if tensor.dtype.is_floating_point else 1)
        and tensor.dtype != torch.uint8
        and not tensor.is_quantized
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _diagonal(tensor: Tensor) -> list[Any]:
    """Read evenly spaced values from the first corner of a tensor towards the last."""
    count = min(_SAMPLES, max(tensor.shape, default=1))
    steps = (
        (size - 1) // (count - 1) * stride if count > 1 else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        line = tensor.detach().as_strided((count,), (sum(steps),), tensor.storage_offset())
        return line.tolist()


torch_checkpoint._allowed_determinism_checks_to_fns[DETERMINISM_CHECK] = Seen
