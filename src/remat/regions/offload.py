"""Offload: saved tensors of a module call that wait for backward in host memory.

NOTE [ One on its way ]
Saved tensors leave and come back one piece of memory (storage) at a time, in the order of the plan:
1. When one is saved, its copy to the host begins, beside the computation. Its memory on the device
   is let go of when the next one of the call is saved, or when the call ends: the computation
   waits there for the copy, so that the memory can be used again.
2. When backward first reads one, the copy of the next one back to the device begins; the first one
   of a call is fetched when it is read. The computation waits for a copy where it is read.
   A plan may have the first ones, or all, fetched before: when backward comes to a module call
   further on (see NOTE [ Entered ] in `remat.regions.prefetch`).
3. A buffer on the host is free again when autograd lets go of the saved tensors in it.
So the moments at which device memory is taken and freed follow from the step alone, never from how
fast copies are; without a GPU they are the same, and the copies run at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from remat.planner.records import Offload
from remat.regions.pool import Buffer, HostPool
from remat.trace.saved import Kept, is_plain

# Any: storages and events are torch's own, without types.

Key = tuple[str, int]  # a module and which of its calls


class Copy:
    """One storage on the host, read back by the views of it that were saved."""

    def __init__(self, pool: HostPool, buffer: Buffer, flat: Tensor) -> None:
        self._pool, self._buffer, self._device = pool, buffer, flat.device
        self._num_readers = 0
        self._readers: set[int] = set()  # saved views that autograd still holds
        self._unread: set[int] = set()  # those of them that have not been read since it is back
        self._back: Tensor | None = None
        self._event: Any = None
        self._back_stream: Any = None
        self.is_first_read = False
        self._source: Tensor | None = flat
        self._source_stream = self._stream()
        self._sent: Any = self._move(flat, buffer.memory)

    def add_reader(self) -> int:
        """Note one more saved view; return its number."""
        self._num_readers += 1
        self._readers.add(self._num_readers)
        return self._num_readers

    def let_source_go(self) -> None:
        """Free the device's memory as soon as the copy to the host is done."""
        source, self._source = self._source, None
        if source is None:
            return
        if self._sent is not None:
            now = self._stream()
            now.wait_event(self._sent)
            if now != self._source_stream:
                source.record_stream(self._pool.stream(self._device))

    def fetch(self) -> None:
        """Begin the copy back to the device, unless it is there.

        Its memory belongs to the stream that computes now, so that the copy begins when that stream
        has come here: what used the memory before it has run by then.
        """
        if self._back is not None:
            return
        self._back_stream = self._stream()
        self._back = torch.empty(self._buffer.size_bytes, dtype=torch.uint8, device=self._device)
        self._event = self._move(self._buffer.memory, self._back)
        self._unread = set(self._readers)
        self.is_first_read = True

    def read(self, reader: int) -> Tensor:
        """Return the storage's bytes on the device, which are held until every reader has read."""
        self.fetch()
        self._wait()
        assert self._back is not None
        flat = self._back
        self.is_first_read = False
        self._unread.discard(reader)
        if not self._unread:
            self._back = self._event = None
        return flat

    def forget(self, reader: int) -> None:
        """Autograd has let go of a reader."""
        self._readers.discard(reader)
        self._unread.discard(reader)
        if self._back is not None and not self._unread:
            self._drop_unread()

    def _drop_unread(self) -> None:
        """Let go of what was fetched and never read; from any thread, whatever its stream."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        self._back = None

    def _wait(self) -> None:
        now = self._stream()
        if self._event is not None:
            now.wait_event(self._event)
        if self._back is not None and now != self._back_stream:
            self._back.record_stream(now)  # else its memory could be used again while it is read

    def _stream(self) -> Any:
        """Return the stream that computes here; `None` where copies run at once."""
        return torch.cuda.current_stream(self._device) if self._buffer.is_pinned else None

    def _move(self, source: Tensor | None, target: Tensor | None) -> Any:
        """Begin a copy; return the event of its end where it runs beside the computation."""
        if source is None or target is None:  # under fake tensors there is nothing to copy
            return None
        with _disable_current_modes(), torch.no_grad():
            if not self._buffer.is_pinned:
                target.copy_(source)
                return None
            stream = self._pool.stream(self._device)
            stream.wait_stream(self._stream())
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
                return stream.record_event()

    def __del__(self) -> None:
        if self._back is not None:
            self._drop_unread()
        self._pool.give(self._buffer)


class Board:
    """What the calls of a forward want back early, by the call that sent it.

    A copy of the board, made when the model is copied or pickled, is empty.
    """

    def __init__(self) -> None:
        self._waiting: dict[Key, list[weakref.ref[Copy]]] = {}

    def __reduce__(self) -> tuple[type[Board], tuple[()]]:
        return type(self), ()

    def put(self, key: Key, copies: list[weakref.ref[Copy]]) -> None:
        """Note what a call has sent."""
        self._waiting[key] = copies

    def take(self, key: Key) -> list[weakref.ref[Copy]]:
        """Return what a call has sent since this was last asked."""
        return self._waiting.pop(key, [])


class _Packed:
    """What autograd keeps in place of a saved tensor: which view of which copy it was."""

    __slots__ = ("_dtype", "_offset", "_reader", "_size", "_stride", "copy", "rank")

    def __init__(self, copy: Copy, rank: int, tensor: Tensor) -> None:
        self.copy, self.rank = copy, rank
        self._reader = copy.add_reader()
        self._dtype, self._size = tensor.dtype, tuple(tensor.shape)
        self._stride, self._offset = tensor.stride(), tensor.storage_offset()

    def read(self) -> Tensor:
        flat = self.copy.read(self._reader).view(self._dtype)
        return flat.as_strided(self._size, self._stride, self._offset)

    def __del__(self) -> None:
        self.copy.forget(self._reader)


@dataclass(frozen=True, slots=True)
class _Known:
    """A storage that was saved before in the same call; `source` is dead once its memory is."""

    source: weakref.ref[Any]
    copy: weakref.ref[Copy]
    version: int
    rank: int


class Transfer:
    """The saved tensors of one call on their way to the host and back; see NOTE [ One on its way ].

    Arguments
    ---------
    on_read: called when backward reads one.
    on_sent: called, where some are to be fetched before they are read, with their copies.
    """

    def __init__(
        self,
        offload: Offload,
        pool: HostPool,
        device_type: str,
        on_read: Callable[[], None],
        on_sent: Callable[[list[weakref.ref[Copy]]], None],
    ) -> None:
        self._pool, self._device_type, self._on_read = pool, device_type, on_read
        self._on_sent = on_sent
        self._num_early = 0 if offload.prefetch is None else offload.prefetch.num_tensors
        self._rank_of = {position: rank for rank, position in enumerate(offload.tensors)}
        self._copies: dict[int, weakref.ref[Copy]] = {}
        self._known: dict[int, _Known] = {}
        self._leaving: Copy | None = None
        self._position = -1

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Send what is saved inside."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._send(None)
            self._known.clear()
            early = [self._copies[r] for r in range(self._num_early) if r in self._copies]
            if early:
                self._on_sent(early)

    def _pack(self, tensor: Tensor) -> Kept | _Packed:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return Kept(tensor)
        self._position += 1
        known = self._known.get(storage._cdata)
        if known is not None and known.source() is not None:
            copy = known.copy()
            # Written to since, it is another value: it stays, and so does the device's memory.
            if copy is None or known.version != tensor._version or not _is_plain(tensor):
                return Kept(tensor)
            return _Packed(copy, known.rank, tensor)
        rank = self._rank_of.get(self._position)
        is_elsewhere = tensor.device.type == "cpu" != self._device_type
        if rank is None or is_elsewhere or not _is_plain(tensor):
            return Kept(tensor)
        copy = self._begin(tensor)
        if copy is None:
            return Kept(tensor)
        self._copies[rank] = weakref.ref(copy)
        self._known[storage._cdata] = _Known(
            weakref.ref(storage), weakref.ref(copy), tensor._version, rank
        )
        return _Packed(copy, rank, tensor)

    def _begin(self, tensor: Tensor) -> Copy | None:
        is_real = not isinstance(tensor, FakeTensor)
        buffer = self._pool.take(
            tensor.untyped_storage().nbytes(),
            is_real=is_real,
            is_pinned=is_real and tensor.device.type == "cuda",
        )
        if buffer is None:
            return None
        self._send(None)
        with torch.no_grad():
            count = buffer.size_bytes // tensor.element_size()
            flat = tensor.detach().as_strided((count,), (1,), 0).view(torch.uint8)
        copy = Copy(self._pool, buffer, flat)
        self._send(copy)
        return copy

    def _send(self, copy: Copy | None) -> None:
        """Let the device's memory of the last one go, and hold on to that of the next."""
        if self._leaving is not None:
            self._leaving.let_source_go()
        self._leaving = copy

    def _unpack(self, packed: Kept | _Packed) -> Tensor:
        self._on_read()
        if isinstance(packed, Kept):
            return packed.read()
        packed.copy.fetch()
        is_first = packed.copy.is_first_read
        tensor = packed.read()
        following = self._copies.get(packed.rank + 1)
        copy = following() if following is not None else None
        if is_first and copy is not None:
            copy.fetch()
        return tensor


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor can leave: its memory is a whole number of its elements."""
    return is_plain(tensor) and tensor.untyped_storage().nbytes() % tensor.element_size() == 0
