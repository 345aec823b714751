"""Capture: run one whole training step under fake tensors and return its record."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from remat.errors import CaptureError, RematError, WorkloadError
from remat.trace.effects import first_change, visible_state
from remat.trace.generators import global_states
from remat.trace.handover import OptimizerPart, note_gradients
from remat.trace.ops import tensors_in
from remat.trace.parallel import (
    check_wrapping,
    refuse_wrapped,
    resizes_in_sight,
    swap_data_parallel,
    swap_sharded,
)
from remat.trace.recorder import Recorder
from remat.trace.records import (
    ACTIVATIONS,
    BACKWARD,
    BATCH,
    BUCKETS,
    BUFFERS,
    FORWARD,
    OPTIMIZER,
    OPTIMIZER_STATE,
    PARAMETERS,
    Handover,
    StepTrace,
)
from remat.trace.standin import (
    FakeFactory,
    map_tensors,
    swap_tensors,
    untouched,
)
from remat.trace.step import (
    DEFAULT_OPTIMIZER,
    OPTIMIZER_STEP,
    Loss,
    OptimizerLike,
    check_model,
    compute_loss,
    explain_failure,
    first_line,
    make_optimizer,
)
from remat.trace.target import Target, default_to_foreach, ops_of

# Any: batches are the user's own types.

_log = logging.getLogger(__name__)

_Names = dict[int, tuple[str, ...]]  # of what lies in each storage

_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


def capture(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
    drop_saved: bool = True,
    device: torch.device | None = None,
    target: Target | None = None,
    like: StepTrace | None = None,
) -> StepTrace:
    """Record one training step: forward, loss, backward and a warm optimizer step.

    The step runs on fake tensors, so no activation is allocated. Control flow that depends on
    integer or boolean inputs follows their values; where it depends on computed floating point
    values, the step is traced with real tensors on a copy of the model, after a warning. The model
    is left exactly as found, also when its forward raises.

    Arguments
    ---------
    drop_saved: separate what autograd holds from what the program holds (see `Recorder`).
    device: where tensors of the meta device are taken to live; default the CPU.
    target: the device whose ops are recorded, for a model whose tensors are on the CPU or meta.
    like: a trace of the same step under other regions, whose optimizer's part is taken over where
        that follows from parameters and gradients (see NOTE [ Handover ]).

    Raises
    ------
    WorkloadError: for a model, batch, loss or optimizer that makes no training step.
    CaptureError: for a step that cannot be traced.
    """
    check_model(model)
    check_wrapping(model)
    run = functools.partial(
        _capture, model, batch, loss=loss, optimizer=optimizer, drop_saved=drop_saved,
        target=target,
    )  # fmt: skip
    try:
        return run(fake=True, device=device or torch.device("cpu"), like=like)
    except _NEEDS_VALUES as error:
        if is_abstract(model, batch):
            raise CaptureError(
                f"the step's control flow depends on computed values ({first_line(error)}), and "
                "the model or batch has none (meta or fake tensors): pass real tensors, on a "
                "small batch."
            ) from error
        message = (
            "the step's control flow depends on computed values, so it was traced with real "
            f"tensors on a copy of the model ({first_line(error)}). The plan holds for batches "
            "that take the same path."
        )
        # Said once for each plan: its simulations trace the same step again.
        _log.log(logging.WARNING if drop_saved else logging.INFO, "%s", message)
    trace = run(fake=False, device=None, like=None)
    trace.notes.append(message)
    return trace


def _capture(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None,
    optimizer: OptimizerLike,
    drop_saved: bool,
    fake: bool,
    device: torch.device | None,
    target: Target | None,
    like: StepTrace | None,
) -> StepTrace:
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    recorder = Recorder(mode, drop_saved=drop_saved)
    device_type = _device_type(model) if target is None else target.device_type
    buckets: list[Tensor] = []
    translate: Callable[[Tensor], Tensor]
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(untouched(model))
            recorder.threads.watch(mode)
            translate = factory = FakeFactory(mode, device or torch.device("cpu"))
            swap_sharded(model, factory)
            swap_tensors(model, factory)
            batch = map_tensors(batch, translate)
            stack.enter_context(_branches_as_on_real_tensors())
            stack.enter_context(mode)
            stack.enter_context(_fake_random_state(is_on_host=device_type != "cpu"))
            stack.enter_context(ops_of(target))
            stack.enter_context(resizes_in_sight(model, recorder))
            buckets = swap_data_parallel(model)
        else:
            refuse_wrapped(model)
            stack.enter_context(untouched(model))
            memo: dict[int, Any] = {}
            model = copy.deepcopy(model, memo)
            model.zero_grad(set_to_none=True)
            batch = copy.deepcopy(map_tensors(batch, Tensor.detach), memo)
            translate = lambda t: memo.get(id(t), t)  # noqa: E731
            stack.enter_context(_random_state_in_sight(recorder))
        parameter_names, buffer_names = _register_base(recorder, model, batch)
        for bucket in buckets:
            recorder.register(bucket, BUCKETS)
        stack.enter_context(_recorded_calls(recorder, model))
        optimizer_object = make_optimizer(optimizer, model, translate)
        default_to_foreach(optimizer_object, device_type)
        try:
            handover = _run(recorder, model, batch, loss, optimizer_object, OptimizerPart.of(like))
            recorder.threads.check()
        except (*_NEEDS_VALUES, RematError):
            raise
        except Exception as error:
            recorder.threads.check()
            raise WorkloadError(_explain(error, recorder)) from error
        finally:
            recorder.recording = False
    return StepTrace(
        ops=recorder.ops,
        storages=recorder.storages,
        handles=recorder.handles,
        calls=recorder.calls,
        signatures=list(recorder.signatures),
        num_ticks=recorder.tick + 1,
        phase_start=recorder.phase_start,
        buffer_names=buffer_names,
        device_type=device_type,
        parameter_names=parameter_names,
        replayed_ticks=recorder.replayed_ticks,
        handover=handover if fake else None,
    )


def _run(
    recorder: Recorder,
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    optimizer: torch.optim.Optimizer | None,
    known: OptimizerPart | None,
) -> Handover:
    """Run the step under the recorder; `known` is the optimizer's part if that need not run."""
    with recorder:
        recorder.begin(FORWARD)
        with torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack):
            value = compute_loss(model, batch, loss)
        recorder.begin(BACKWARD)
        value.backward()  # type: ignore[no-untyped-call]
        handover = note_gradients(recorder, model.parameters())
        if known is not None and known.follows(handover):
            known.take_over(recorder, handover)
        else:
            _optimize(recorder, optimizer)
        recorder.tick += 1
        recorder.close()
        del value
    return handover


def _optimize(recorder: Recorder, optimizer: torch.optim.Optimizer | None) -> None:
    """Record a warm step of the optimizer: an unrecorded first one makes its state."""
    if optimizer is not None:
        recorder.recording = False
        recorder.stage = OPTIMIZER_STEP
        optimizer.step()
        for state in optimizer.state.values():
            for tensor in tensors_in(state):
                recorder.register_as(tensor, OPTIMIZER_STATE)
        recorder.recording = True
    recorder.begin(OPTIMIZER)
    if optimizer is not None:
        optimizer.step()


def _register_base(recorder: Recorder, model: nn.Module, batch: Any) -> tuple[_Names, _Names]:
    """Note what lives through the whole step; return names of parameters, buffers by storage."""
    parameters: _Names = {}
    for name, parameter in model.named_parameters():
        for tensor in tensors_in(parameter):
            index = recorder.register(tensor, PARAMETERS)
            parameters[index] = (*parameters.get(index, ()), name)
    names: _Names = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        index = recorder.register(buffer, BUFFERS)
        names[index] = (*names.get(index, ()), name)

    def note(tensor: Tensor) -> Tensor:
        recorder.register(tensor, BATCH)
        return tensor

    map_tensors(batch, note)
    return parameters, names


@contextlib.contextmanager
def _recorded_calls(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Wrap each module's forward so that the recorder sees calls begin and end."""
    saved = [(module, module.__dict__.get("forward")) for module in model.modules()]
    for name, module in model.named_modules():
        module.__dict__["forward"] = functools.partial(
            _recorded_forward, recorder, name, module, module.forward
        )
    try:
        yield
    finally:
        for module, before in saved:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _recorded_forward(
    recorder: Recorder,
    name: str,
    module: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not recorder.recording or recorder.threads.is_unseen(f"in module {name!r}"):
        return forward(*args, **kwargs)
    index = recorder.enter_call(name, (args, kwargs))
    before, state = global_states(), visible_state(module, (args, kwargs))
    try:
        output = forward(*args, **kwargs)
        changed = first_change(state, visible_state(module, (args, kwargs)))
        if changed:
            recorder.note_change(f"{changed} of {name!r}" if name else changed)
        recorder.leave_call(index, output, before)
    finally:
        recorder.call_stack.remove(index)
    return output


@contextlib.contextmanager
def _branches_as_on_real_tensors() -> Iterator[None]:
    """Keep libraries from taking another branch because a tensor is fake.

    Transformers builds attention masks for fake tensors that it does not build for real ones
    (48 MiB on a 16-layer Llama); its test for fakes is switched off while tracing.
    """
    utilities = sys.modules.get("transformers.utils.import_utils")
    original = getattr(utilities, "is_fake_tensor", None)
    if utilities is None or original is None:
        yield
        return
    utilities.is_fake_tensor = lambda _: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utilities.is_fake_tensor = original  # type: ignore[attr-defined]


@contextlib.contextmanager
def _fake_random_state(*, is_on_host: bool) -> Iterator[None]:
    """Let saved random states be fake tensors, so that the record counts their bytes.

    Checkpointing keeps one for each region that draws; fake random ops draw nothing. States are
    kept on the host, so for a step on a device they count nothing.
    """
    get, put = torch.get_rng_state, torch.set_rng_state
    size = 0 if is_on_host else get().numel()
    torch.get_rng_state = lambda: torch.empty(size, dtype=torch.uint8)
    torch.set_rng_state = lambda new_state: None  # noqa: ARG005
    try:
        yield
    finally:
        torch.get_rng_state, torch.set_rng_state = get, put


@contextlib.contextmanager
def _random_state_in_sight(recorder: Recorder) -> Iterator[None]:
    """Count the bytes of saved random states, which no op makes, when tensors are real."""
    get = torch.get_rng_state

    def get_and_note() -> Tensor:
        state = get()
        if recorder.recording:
            recorder.tick += 1
            recorder.register(state, ACTIVATIONS)
        return state

    torch.get_rng_state = get_and_note
    try:
        yield
    finally:
        torch.get_rng_state = get


def is_abstract(model: nn.Module, batch: Any) -> bool:
    """Whether a model or batch has no values: meta or fake tensors."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in found)


def _device_type(model: nn.Module) -> str:
    for parameter in model.parameters():
        return "cpu" if parameter.device.type == "meta" else parameter.device.type
    return "cpu"


def _explain(error: Exception, recorder: Recorder) -> str:
    """Say in which phase and, in forward, after which module's start a step failed."""
    last = recorder.calls[-1].module if recorder.calls and recorder.stage == FORWARD else ""
    return explain_failure(
        f"{recorder.stage}, last in module {last!r}" if last else recorder.stage, error
    )
