"""A dispatch mode that writes down every op of a training step, and what memory lives when.

NOTE [ Gathered ]
FSDP2 gathers parameters into storages that autograd goes on holding while they are empty: their
memory comes and goes by resizing. Such a storage is recorded as a parameter of no bytes, so that
holding it costs nothing, and its memory as a storage beside it, which nothing else knows of.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils.flop_counter import flop_registry

from remat.trace.collectives import is_distributed, results_of_collective, unwrapped
from remat.trace.generators import GlobalStates, global_states
from remat.trace.leaves import Identities, flatten
from remat.trace.ops import (
    describe,
    device_of_fake,
    dtype_name,
    is_random,
    name_of,
    nodes_in,
    tensors_in,
    written_by,
    written_to,
)
from remat.trace.records import (
    ACTIVATIONS,
    BACKWARD,
    BASE_KINDS,
    EMPTY_OPS,
    FORWARD,
    GATHERED,
    PARAMETERS,
    TEMPORARIES,
    Call,
    Handle,
    Leaves,
    Op,
    OpSignature,
    Storage,
)
from remat.trace.recurrent import as_the_kernel
from remat.trace.replaying import is_replaying
from remat.trace.saved import Versions
from remat.trace.standin import map_tensors
from remat.trace.threads import Threads
from remat.trace.values import (
    compute_from_values,
    follow_values,
    forget_values,
    set_value,
    shadow_arguments,
    value_of,
)

# Any: arguments of ops and modules are whatever torch and the user pass.

_SCALAR = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_COPY_OUT = "fsdp::split_with_sizes_copy"  # fills gathered parameters


class Packed:
    """What autograd keeps in place of a saved tensor; its death is the tensor's release."""

    __slots__ = ("_recorder", "check", "handle", "restore")

    def __init__(
        self,
        recorder: Recorder,
        handle: Handle,
        restore: Callable[[], Tensor],
        check: Callable[[], None],
    ) -> None:
        self._recorder = recorder
        self.handle = handle
        self.restore = restore
        self.check = check

    def __del__(self) -> None:
        self.handle.end = max(self.handle.end, self._recorder.tick)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record ops, storages and saved tensors while active.

    Works above `FakeTensorMode` (nothing is allocated) and on real tensors. `drop_saved` replaces
    tensors saved for backward by stand-ins, so that the trace separates what autograd holds from
    what the program holds; the timeline of any plan then follows from one trace.
    """

    def __init__(self, fake_mode: FakeTensorMode | None, *, drop_saved: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = fake_mode
        self.drop_saved = drop_saved
        self.recording = True
        self.phase = self.stage = FORWARD
        self.tick = 0
        self.ops: list[Op] = []
        self.storages: list[Storage] = []
        self.handles: list[Handle] = []
        self.calls: list[Call] = []
        self.signatures: dict[OpSignature, int] = {}
        self.call_stack: list[int] = []
        self.phase_start: dict[str, int] = {}
        self.replayed_ticks: list[int] = []
        self.threads = Threads()
        self._live: dict[int, int] = {}  # address of a storage -> id
        self._since: dict[int, int] = {}  # id -> tick from which it holds memory
        self._gathered: dict[int, int] = {}  # id of a gathered parameter -> id of its memory
        self._watchers: dict[int, weakref.ref[Any]] = {}
        self._stand_ins: dict[int, Handle] = {}  # address -> saved tensor that it stands for
        self._call_counts: dict[str, int] = {}
        self._identities = Identities()
        self._versions = Versions()

    # -- storages ---------------------------------------------------------------------------------

    def register(self, tensor: Tensor, kind: str) -> int:
        """Return the id of a tensor's storage, noting its birth if it is new."""
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None:
            return known
        if self.fake_mode is None:  # fakes tell of themselves
            self.threads.note_result(tensor)
        index = len(self.storages)
        call = self.call_stack[-1] if self.call_stack else -1
        self.storages.append(Storage(storage.nbytes(), kind, self.tick, call))
        self._since[index] = self.tick
        self._watch(storage, index, None)
        return index

    def register_as(self, tensor: Tensor, kind: str) -> int:
        """Return the id of a tensor's storage, of this kind unless it is there all the time."""
        index = self.register(tensor, kind)
        if self.storages[index].kind not in BASE_KINDS:  # a gradient may be a view of a bucket
            self.storages[index].kind = kind
        return index

    def _watch(self, storage: Any, index: int, handle: Handle | None) -> None:
        address = storage._cdata
        self._live[address] = index
        if handle is not None:
            self._stand_ins[address] = handle

        def died(_: object) -> None:
            self._live.pop(address, None)
            self._watchers.pop(address, None)
            self._stand_ins.pop(address, None)
            if handle is None:
                self._end_interval(index)
            else:
                handle.end = max(handle.end, self.tick)

        self._watchers[address] = weakref.ref(storage, died)

    def _end_interval(self, index: int) -> None:
        """Note that nothing but saved tensors holds a storage's memory from now on."""
        index = self._gathered.get(index, index)
        since = self._since.pop(index, None)
        if since is not None:
            self.storages[index].intervals.append((since, self.tick))

    def note_resize(self, storage: Any, size_bytes: int) -> None:
        """Note that a storage gives its memory back, or takes it anew, while tensors hold it."""
        index = self._live.get(storage._cdata)
        if index is None or not self.recording:
            return
        index = self._gathered.get(index, index)
        if size_bytes == 0:
            self._end_interval(index)
        else:
            self.tick += 1
            self._since.setdefault(index, self.tick)
            self.storages[index].size_bytes = size_bytes

    def _note_gathered(self, index: int) -> None:
        """Count the memory of a gathered parameter apart from it; see NOTE [ Gathered ]."""
        if index in self._gathered:
            return
        parameter = self.storages[index]
        memory = len(self.storages)
        self._gathered[index] = memory
        self.storages.append(Storage(parameter.size_bytes, GATHERED, self.tick, parameter.call))
        self._since[memory] = self._since.pop(index)
        parameter.kind, parameter.size_bytes = PARAMETERS, 0

    def close(self) -> None:
        """End the record: what is alive now stays alive to the last tick."""
        for address, index in list(self._live.items()):
            if address in self._watchers:
                self._end_interval(index)
        for handle in self._stand_ins.values():  # as where a gradient is a saved tensor's memory
            handle.end = self.tick
        self._live.clear()
        self._watchers.clear()
        self._stand_ins.clear()
        for handle in self.handles:
            if handle.end < 0:
                handle.end = self.tick
        self.recording = False

    # -- saved tensors ----------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """Note a tensor saved for backward; keep only what is needed to make a stand-in."""
        if not self.recording:
            return tensor
        self.tick += 1
        inner, wrap = unwrapped(tensor)
        index = self.register(inner, ACTIVATIONS)
        call = self.call_stack[-1] if self.call_stack else -1
        handle = Handle(index, call, self.tick, ops_before=len(self.ops))
        self.handles.append(handle)
        stays = self.storages[index].birth == 0 or index in self._gathered
        check = self._versions.check_of(tensor)
        if stays or not self.drop_saved:
            return Packed(self, handle, lambda: tensor, check)
        stand_in = self._stand_in(inner, index, handle)
        return Packed(self, handle, lambda: wrap(stand_in()), check)

    def _stand_in(self, tensor: Tensor, index: int, handle: Handle) -> Callable[[], Tensor]:
        if self.fake_mode is None:
            with _disable_current_modes(), torch.no_grad():
                copy: Tensor | None = tensor.detach().clone(memory_format=torch.preserve_format)
        else:
            copy = None
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        dtype, device = tensor.dtype, tensor.device
        value = value_of(tensor)
        mode = self.fake_mode

        def restore() -> Tensor:
            if copy is not None:
                fresh = copy
            else:
                assert mode is not None
                with _disable_current_modes(), mode:
                    fresh = torch.empty_strided(size, stride, dtype=dtype, device=device)
                if value is not None:
                    set_value(fresh, value)
            self._watch(fresh.untyped_storage(), index, handle)
            return fresh

        return restore

    def unpack(self, packed: Any) -> Tensor:
        """Give backward a stand-in that shares the id of the saved tensor's storage."""
        if not isinstance(packed, Packed):
            return packed  # type: ignore[no-any-return]
        self.tick += 1
        if packed.handle.unpack < 0:
            packed.handle.unpack = self.tick
        packed.check()
        return packed.restore()

    # -- module calls -----------------------------------------------------------------------------

    def enter_call(self, module: str, arguments: Any) -> int:
        """Note that a module's forward begins."""
        self.tick += 1
        count = self._call_counts.get(module, 0)
        if self.phase == FORWARD:
            self._call_counts[module] = count + 1
        index = len(self.calls)
        inputs = tuple(dict.fromkeys(self.register(t, ACTIVATIONS) for t in tensors_in(arguments)))
        leaves = self._leaves(arguments)
        parent = self.call_stack[-1] if self.call_stack else -1
        self.calls.append(
            Call(
                module, count, parent, self.tick, len(self.ops), inputs=inputs,
                arguments=leaves, uses_grad=torch.is_grad_enabled(), phase=self.phase,
            )
        )  # fmt: skip
        self.call_stack.append(index)
        return index

    def note_change(self, what: str) -> None:
        """Note that the calls under way changed something that Python holds."""
        for index in self.call_stack:
            self.calls[index].changed_state = self.calls[index].changed_state or what

    def leave_call(self, index: int, outputs: Any, random_before: GlobalStates) -> None:
        """Note that a module's forward ended."""
        self.tick += 1
        call = self.calls[index]
        call.end, call.stop_op = self.tick, len(self.ops)
        random_after = global_states()
        call.draws_python_random = random_before.python != random_after.python
        call.moves_random_state = random_before.torch != random_after.torch
        call.outputs = tuple(
            dict.fromkeys(self.register(t, ACTIVATIONS) for t in tensors_in(outputs))
        )
        call.results = self._leaves(outputs)
        if self.drop_saved and call.phase == FORWARD and call.uses_grad:
            for node in nodes_in(outputs):
                node.register_prehook(functools.partial(self._enter_backward, call))

    def _enter_backward(self, call: Call, _gradients: Any) -> None:
        """Note that backward comes to the result of a call: the next tick is the first after."""
        if call.entered < 0:
            call.entered = self.tick + 1

    def _leaves(self, value: Any) -> Leaves:
        found, nesting = flatten(value)
        # A wrapper has no memory of its own: it is an object like any other.
        where = [
            (i, leaf)
            for i, leaf in enumerate(found)
            if isinstance(leaf, Tensor) and not is_traceable_wrapper_subclass(leaf)
        ]
        return Leaves(
            nesting,
            tuple(self._identities.of(leaf) for leaf in found),
            tuple(i for i, _ in where),
            # A wrapper stands for the first of the tensors in it.
            tuple(self.register(next(tensors_in(leaf)), ACTIVATIONS) for _, leaf in where),
        )

    # -- ops --------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.threads.follow()
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return device_of_fake(args[0])  # autograd asks more often than it runs ops
        if is_distributed(types):
            return NotImplemented  # its own dispatch comes first, and makes ops on what it wraps
        if func.namespace == "c10d" and self.fake_mode is not None:
            return self._skip_collective(func, args, kwargs)
        written = written_to(func, args, kwargs)
        if self.fake_mode is not None and not all(isinstance(t, FakeTensor) for t in written):
            # A real tensor from outside the model, which even `FakeTensorMode` would write to.
            args, kwargs = map_tensors((args, kwargs), self.fake_mode.from_tensor)
            written = written_to(func, args, kwargs)
        shadows = shadow_arguments(args, kwargs) if self.fake_mode is not None else None
        if shadows is not None and func is _SCALAR:
            with _disable_current_modes():
                return func(*shadows[0], **shadows[1])
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if shadows is None or self.fake_mode is None:
                raise
            out = compute_from_values(func, shadows, self.fake_mode)
        else:
            if shadows is None or not follow_values(func, shadows, out):
                forget_values(written)
        if self.fake_mode is not None:
            out = as_the_kernel(func, args, out, self.fake_mode)
        if self.recording and func.namespace != "prim":
            self._record(func, args, kwargs, out)
        return out

    def _skip_collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a collective, and return as if every process had taken part in it."""
        out = results_of_collective(func, args)
        if self.recording:
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.tick += 1
        # Only the recomputation of modules enables gradients in backward; single ops say so.
        if self.phase == BACKWARD and (torch.is_grad_enabled() or is_replaying()):
            self.replayed_ticks.append(self.tick)
        kind = ACTIVATIONS if self.phase == FORWARD else TEMPORARIES
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        inputs = tuple(dict.fromkeys(self.register(t, kind) for t in tensors))
        known = len(self.storages)
        produced = list(tensors_in(out))
        outputs = [self.register(t, kind) for t in produced]
        fresh = tuple(dict.fromkeys(i for i in outputs if i >= known))
        schema_name = func._schema.name
        if schema_name in _RESIZED_RESULTS and fresh and out.numel() == 1:
            # The storage is that of the loss before it was reduced.
            self.storages[fresh[0]].size_bytes = max(t.numel() for t in tensors) * out.itemsize
        for tensor, size_bytes in _wider_statistics(schema_name, args, produced):
            self.storages[self.register(tensor, kind)].size_bytes = size_bytes
        if schema_name == _COPY_OUT:
            for tensor in tensors_in(kwargs["out"]):
                self._note_gathered(self.register(tensor, kind))
        # What communication writes to is as it was when it is read.
        is_communication = func.namespace in ("c10d", "fsdp")
        mutated = [] if is_communication else written_by(func, args, kwargs)
        mutated_ids = tuple(dict.fromkeys(self.register(t, kind) for t in mutated))
        moved = 0
        name = name_of(func)
        if name not in EMPTY_OPS:
            moved = sum(t.numel() * t.element_size() for t in (*tensors, *produced))
        formula = flop_registry.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        signature = OpSignature(
            name, describe(args), tuple((k, describe(v)) for k, v in kwargs.items())
        )
        floating = next((t.dtype for t in (*tensors, *produced) if t.is_floating_point()), None)
        self.ops.append(
            Op(
                self.tick,
                name,
                self.sign(signature),
                self.call_stack[-1] if self.call_stack else -1,
                self.phase,
                flops,
                moved,
                inputs,
                fresh,
                mutated_ids,
                is_random(func, args, kwargs),
                dtype_name(floating) if floating is not None else "",
            )
        )

    def sign(self, signature: OpSignature) -> int:
        """Return the number of an op's signature: the same one for equal calls."""
        return self.signatures.setdefault(signature, len(self.signatures))

    def begin(self, phase: str) -> None:
        """Note that a phase of the step begins."""
        self.tick += 1
        self.phase = self.stage = phase
        self.phase_start[phase] = self.tick


# Losses whose kernel reduces into the memory of the unreduced loss, and returns that.
_RESIZED_RESULTS = frozenset({"aten::mse_loss", "aten::smooth_l1_loss", "aten::huber_loss"})


def _wider_statistics(
    schema_name: str, args: tuple[Any, ...], produced: list[Tensor]
) -> Iterator[tuple[Tensor, int]]:
    """Yield the statistics that BatchNorm saves, with their real bytes.

    For inputs of half precision with weights of full precision, as under autocast, kernels save
    them in that of the weights; fakes say that of the input.
    """
    weight = args[1] if schema_name == "aten::native_batch_norm" else None
    if isinstance(weight, Tensor):
        for tensor in produced[1:3]:
            yield tensor, tensor.numel() * max(tensor.itemsize, weight.itemsize)
