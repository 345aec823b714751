"""Host memory for what a plan moves off the device: buffers that are used again each step."""

from __future__ import annotations

import logging
import mmap
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_log = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


class Buffer:
    """Bytes on the host, outside torch's allocator; `memory` is `None` where none are needed.

    Anonymous pages, so that they are not counted as memory of a CPU that is the device, and pinned
    where the device is a GPU: no allocator rounds their size up.
    """

    __slots__ = ("_address", "is_pinned", "is_real", "memory", "size_bytes")

    def __init__(self, size_bytes: int, *, is_real: bool, is_pinned: bool) -> None:
        self.size_bytes, self.is_real, self.is_pinned = size_bytes, is_real, is_pinned
        self.memory: Tensor | None = None
        self._address = 0
        if not is_real:
            return
        with _disable_current_modes():
            self.memory = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)
        if is_pinned:
            self._pin(self.memory.data_ptr())

    def _pin(self, address: int) -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # Any: C bindings
        status = int(cudart.cudaHostRegister(address, self.size_bytes, _PORTABLE))
        if status == 0:
            self._address = address
        else:
            _log.warning(
                "%d bytes of host memory could not be pinned (CUDA error %d): copies to and from "
                "them do not overlap with compute", self.size_bytes, status,
            )  # fmt: skip

    def __del__(self) -> None:
        if self._address:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # Any: C bindings
            cudart.cudaHostUnregister(self._address)


class HostPool:
    """The host memory of one plan on one model.

    A buffer that is given back serves the next request of its size, in this step or a later one;
    where none has the size, the idle ones are let go of first. A copy of the pool, made when the
    model is copied or pickled, starts empty.

    Attributes
    ----------
    limit_bytes: the most that is handed out; `None` is no limit.
    held_bytes: what is mapped now, in use or idle.
    peak_bytes: the most that was mapped at any time.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.peak_bytes = 0
        self._idle: dict[tuple[int, bool, bool], list[Buffer]] = {}
        self._is_closed = False
        self._has_warned = False
        # A release may come from the garbage collector, while this very thread holds the lock.
        self._lock = threading.RLock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[type[HostPool], tuple[int | None]]:
        return type(self), (self.limit_bytes,)

    def take(self, size_bytes: int, *, is_real: bool, is_pinned: bool) -> Buffer | None:
        """Return a buffer; `None` where it would exceed the limit."""
        key = (size_bytes, is_real, is_pinned)
        with self._lock:
            if self._idle.get(key):
                return self._idle[key].pop()
            self._drop_idle()
            if self.limit_bytes is not None and self.held_bytes + size_bytes > self.limit_bytes:
                if not self._has_warned:
                    self._has_warned = True
                    _log.warning(
                        "the host budget of %d bytes is used up: what exceeds it stays on the "
                        "device. Larger batches, or several forwards before a backward, need more "
                        "than planned.", self.limit_bytes,
                    )  # fmt: skip
                return None
            buffer = Buffer(size_bytes, is_real=is_real, is_pinned=is_pinned)
            self.held_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            return buffer

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back; it may be handed out again at once."""
        with self._lock:
            if self._is_closed:
                self._finish_copies()  # the buffer is freed next
                self.held_bytes -= buffer.size_bytes
                return
            key = (buffer.size_bytes, buffer.is_real, buffer.is_pinned)
            self._idle.setdefault(key, []).append(buffer)

    def close(self) -> None:
        """Free every idle buffer now, and those in use when they are given back."""
        with self._lock:
            self._is_closed = True
            self._drop_idle()

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream that copies run on.

        One for both directions: copies run in the order in which they are asked for, so that a
        buffer that was given back is not written before what was asked for earlier has read it.
        """
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            return self._streams[device]

    def _drop_idle(self) -> None:
        dropped = [buffer for buffers in self._idle.values() for buffer in buffers]
        self._idle.clear()
        if dropped:
            self._finish_copies()
        self.held_bytes -= sum(buffer.size_bytes for buffer in dropped)

    def _finish_copies(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
