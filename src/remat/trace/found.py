"""The regions that a model's author checkpoints, found in a trace that runs them plainly."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from remat.trace.caches import caches_in
from remat.trace.capture import capture
from remat.trace.checkpoints import AbstractVisitor, CheckpointCall, visited
from remat.trace.effects import first_change, visible_state
from remat.trace.generators import global_states
from remat.trace.ops import tensors_in
from remat.trace.recorder import Recorder
from remat.trace.records import ACTIVATIONS, Call, StepTrace
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike

# Any: checkpointed functions, their arguments and batches are the user's own.


@dataclass(slots=True)
class FoundRegion:
    """One checkpointed call: its place in the trace, and what was seen around it.

    `caller` is the module whose forward checkpoints (call `caller_call` of the trace), `module` the
    module call or calls that are recomputed ("" where it is a function that does more or less).
    `depth` counts the checkpointed calls around it.
    """

    caller: str
    caller_call: int
    function: str
    is_reentrant: bool
    preserves_random_state: bool
    depth: int
    start: int
    first_op: int
    first_call: int
    inputs: tuple[int, ...]
    has_cache: bool
    inputs_need_grad: bool
    nested_inputs_need_grad: bool
    module: str = ""
    end: int = -1
    stop_op: int = -1
    stop_call: int = -1
    outputs_need_grad: bool = False
    draws_python_random: bool = False
    changed_state: str = ""
    uses_grad: bool = True

    @property
    def where(self) -> str:
        """Name the region for people."""
        return self.module or f"{self.caller or 'the model'} (function {self.function})"


def trace_without_checkpointing(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> tuple[StepTrace, tuple[FoundRegion, ...]]:
    """Trace a step with every checkpointed function run plainly; return where they lie in it.

    Raises
    ------
    WorkloadError, CaptureError: as `capture`.
    """
    finder = _Finder()
    with visited(finder):
        trace = capture(model, batch, loss=loss, optimizer=optimizer)
    for region in finder.regions:
        region.module = _place(region, trace.calls)
    return trace, tuple(finder.regions)


class _Finder(AbstractVisitor):
    """Switches checkpointing off, and notes in the recorder's terms where each region lies."""

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self.regions: list[FoundRegion] = []
        self._open: list[tuple[CheckpointCall, FoundRegion | None, Any, Any]] = []

    def enter(self, call: CheckpointCall) -> bool:
        """Note where a region begins."""
        recorder = _active_recorder()
        if recorder is None or not recorder.recording:
            self._open.append((call, None, None, None))
            return False
        if recorder is not self._recorder:  # the step is traced anew, with real tensors
            self._recorder, self.regions = recorder, []
        args, kwargs = _arguments(call)
        given = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]
        nested = [t for a in (args, kwargs) for t in tensors_in(a)]
        inputs = dict.fromkeys(recorder.register(t, ACTIVATIONS) for t in nested)
        around = recorder.call_stack[-1] if recorder.call_stack else -1
        region = FoundRegion(
            caller=recorder.calls[around].module if around >= 0 else "",
            caller_call=around,
            function=_name_of(call.function),
            is_reentrant=call.is_reentrant,
            preserves_random_state=call.preserves_random_state,
            depth=len(self._open),
            start=recorder.tick,
            first_op=len(recorder.ops),
            first_call=len(recorder.calls),
            inputs=tuple(inputs),
            has_cache=bool(caches_in((args, kwargs))),
            inputs_need_grad=any(t.requires_grad for t in given),
            nested_inputs_need_grad=any(
                t.requires_grad for t in nested if not any(t is known for known in given)
            ),
            uses_grad=torch.is_grad_enabled(),
        )
        self.regions.append(region)
        state = visible_state(_owner(call.function), (args, kwargs))
        self._open.append((call, region, state, global_states().python))
        return False

    def leave(self, call: CheckpointCall, output: Any) -> None:
        """Note where a region ends, and what it changed."""
        _, region, before, random_before = self._open.pop()
        recorder = self._recorder
        if region is None or recorder is None:
            return
        region.end, region.stop_op = recorder.tick, len(recorder.ops)
        region.stop_call = len(recorder.calls)
        region.outputs_need_grad = any(t.requires_grad for t in tensors_in(output))
        region.draws_python_random = random_before != global_states().python
        after = visible_state(_owner(call.function), _arguments(call))
        changed = first_change(before, after)
        inside = recorder.calls[region.first_call : region.stop_call]
        region.changed_state = changed or next(
            (c.changed_state for c in inside if c.changed_state), ""
        )


def _active_recorder() -> Recorder | None:
    modes = _get_current_dispatch_mode_stack()
    return next((m for m in reversed(modes) if isinstance(m, Recorder)), None)


def _place(region: FoundRegion, calls: list[Call]) -> str:
    """Name the module calls that a region is: those in it, or the one that it fills."""
    bounds = (region.first_op, region.stop_op)
    inside = calls[region.first_call : region.stop_call]
    outermost = [c for c in inside if c.parent < region.first_call]
    if outermost and (outermost[0].first_op, outermost[-1].stop_op) == bounds:
        first, last = outermost[0].module, outermost[-1].module
        return first if first == last else f"{first} to {last}"
    if region.caller_call >= 0:
        around = calls[region.caller_call]
        if (around.first_op, around.stop_op) == bounds:
            return around.module
    return ""


def _arguments(call: CheckpointCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return all that a checkpointed function is given: also by a partial, or by its closure."""
    function, args, kwargs = call.function, call.args, dict(call.kwargs)
    while isinstance(function, functools.partial):
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    args = (*args, *_closure(function))
    return args, kwargs


def _closure(function: Any) -> Iterator[Any]:
    plain = getattr(function, "__func__", function)
    for cell in getattr(plain, "__closure__", None) or ():
        with_content = getattr(cell, "cell_contents", None)
        if isinstance(with_content, (list, Mapping, set, Tensor)):
            yield with_content


_NO_MODULE = nn.Module()


def _owner(function: Any) -> nn.Module:
    """Return the module whose own attributes a function may change."""
    while isinstance(function, functools.partial):
        modules = [a for a in function.args[:1] if isinstance(a, nn.Module)]
        function = modules[0] if modules else function.func
    owner = function.__self__ if isinstance(function, types.MethodType) else function
    return owner if isinstance(owner, nn.Module) else _NO_MODULE


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__name__).replace("<locals>.", "")
