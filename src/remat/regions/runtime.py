"""What runs in place of a region's forward: checkpointing that updates and draws exactly once."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from remat.errors import ApplyError
from remat.planner.records import Offload
from remat.regions.choices import Choosing, ChoosingAgain
from remat.regions.dropping import DroppedOps, Dropping
from remat.regions.guards import DRAWING, Guarded, Lane, all_modules, refuse_transforms, run_eagerly
from remat.regions.offload import Board, Transfer
from remat.regions.pool import HostPool
from remat.regions.recall import DETERMINISM_CHECK, LOOKS, PERIOD, Recall
from remat.regions.runs import HookTable, Run, gives_twice, with_tensors_first
from remat.trace.caches import Filled, caches_in, with_empty_caches

# Any: a module's arguments and results are the user's own.

_thread = threading.local()
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def is_recomputing() -> bool:
    """Whether this thread is inside a region's recomputation."""
    return getattr(_thread, "depth", 0) > 0


@dataclass
class StepClock:
    """Shared by the regions of one plan: which forward we are in.

    The first recomputation after a forward tells that the step has reached its backward; calls
    seen after it belong to the next step.
    """

    step: int = 0
    in_backward: bool = False
    lane: Lane = field(default_factory=Lane)

    def note_backward(self) -> None:
        """Note that backward reads something."""
        self.in_backward = True

    def note_forward(self) -> int:
        """Return the number of the present step."""
        if self.in_backward:
            self.in_backward = False
            self.step += 1
        return self.step


@dataclass
class Offloads:
    """Which calls of a module keep something in host memory, and where.

    `kept` are the calls that do not run again: what they saved is offloaded, not their inputs. On
    the `board` stands what is to be fetched before it is read.
    """

    module: str
    pool: HostPool
    board: Board
    device_type: str
    by_call: dict[int, Offload]
    kept: frozenset[int]


@dataclass
class RegionRuntime:
    """How one module's forward is run under a plan.

    `calls` are the calls within a step that the plan is about, of `num_calls` in all; `None` is all
    of them. `is_eager` keeps it out of what torch.compile compiles. `buffers` are (module, name)
    pairs that the forward updates. `replaced` is a forward that the instance already had, which the
    region wraps and `remove` puts back. One that `keeps_choices` has what its ops chose kept (see
    NOTE [ Choices ]). A region that `is_nested` runs again, as a region, inside
    the recomputation of the one around it. `name` is what errors call the region.
    """

    clock: StepClock
    calls: frozenset[int] | None = None
    num_calls: int = 1
    saved_ops: dict[int, frozenset[tuple[str, int]]] = field(default_factory=dict)
    dropped_ops: dict[int, DroppedOps] = field(default_factory=dict)
    preserve_rng_state: bool = False
    draws_python_random: bool = False
    keeps_choices: bool = False
    is_eager: bool = False
    buffers: tuple[tuple[nn.Module, str], ...] = ()
    replaced: Callable[..., Any] | None = None
    run: Run | None = None
    is_nested: bool = False
    offloads: Offloads | None = None
    name: str = ""
    _step: int = -1
    _count: int = 0
    _forwards: int = 0

    def selected_call(self) -> int | None:
        """Return which call within the step begins now; `None` if the plan leaves it alone."""
        if self.calls is None and self.num_calls == 1:
            return 0
        step = self.clock.note_forward()
        if step != self._step:
            self._step, self._count = step, 0
        index = self._count % self.num_calls
        self._count += 1
        return index if self.calls is None or index in self.calls else None

    def recall(self) -> AbstractContextManager[Any] | None:
        """Return what has the values of this forward compared; `None` in most steps."""
        self._forwards += 1
        if (self._forwards - 1) % (PERIOD * self.num_calls) >= LOOKS * self.num_calls:
            return None
        return Recall(self.name, self.buffers)

    def transfer(self, call: int) -> Transfer | None:
        """Return what moves the tensors of a call that keeps some in host memory."""
        if self.offloads is None or call not in self.offloads.by_call:
            return None
        offload, pool = self.offloads.by_call[call], self.offloads.pool
        return Transfer(
            offload,
            pool,
            self.offloads.device_type,
            self.clock.note_backward,
            functools.partial(self.offloads.board.put, (self.offloads.module, call)),
        )


def region_forward(module: nn.Module, runtime: RegionRuntime, *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward as a checkpointed region where the plan says so."""
    if runtime.is_eager and torch.compiler.is_compiling():
        return run_eagerly(region_forward, module, runtime, *args, **kwargs)
    forward = runtime.replaced or functools.partial(type(module).forward, module)
    if torch.compiler.is_exporting():  # a graph to keep: inference, without recomputation
        return forward(*args, **kwargs)
    run = runtime.run
    if run is not None:
        run.begin()
    if not torch.is_grad_enabled() or (is_recomputing() and not runtime.is_nested):
        return forward(*args, **kwargs)
    call = runtime.selected_call()
    if call is None:
        return forward(*args, **kwargs)
    transfer = runtime.transfer(call)
    if transfer is not None:
        if torch.compiler.is_compiling():  # what it saves is the compiler's choice
            transfer = None
        elif runtime.offloads is not None and call in runtime.offloads.kept:
            with transfer():
                return forward(*args, **kwargs)
    dropped = runtime.dropped_ops.get(call)
    if dropped is not None and not torch.compiler.is_compiling():
        refuse_transforms()
        with Dropping(dropped, runtime.clock.note_backward).watching():
            return forward(*args, **kwargs)
    saved_ops = runtime.saved_ops.get(call, frozenset())
    if run is not None:
        forward = functools.partial(run.forward, forward)
    options: dict[str, Any] = {}
    has_aliases = False
    recall = None
    if not torch.compiler.is_compiling():
        refuse_transforms()
        has_aliases = gives_twice(args, kwargs)
        caches = caches_in((args, kwargs))
        if caches:
            forward = functools.partial(_fill_once, forward, [Filled(cache) for cache in caches])
        members = (module,) if run is None else run.members
        modules = all_modules(members)
        hooks = _hook_tables(modules[len(members) :], run)
        needs_contexts = runtime.buffers or runtime.num_calls > 1 or runtime.keeps_choices
        if needs_contexts or hooks or saved_ops or caches:
            options["context_fn"] = functools.partial(_contexts, runtime, hooks, saved_ops)
        recall = runtime.recall()
        if recall is not None:
            options["determinism_check"] = DETERMINISM_CHECK
        draws = runtime.preserve_rng_state or runtime.draws_python_random
        forward = Guarded(
            modules,
            forward,
            lane=DRAWING if draws else runtime.clock.lane,
            draws_python_random=runtime.draws_python_random,
        )
    if run is not None or runtime.is_nested or transfer is not None or has_aliases:
        forward, args = with_tensors_first(forward, args, kwargs)
        kwargs = {}
    # Checkpointing saves its inputs as any op does: outside its own hooks, inside these.
    with transfer() if transfer is not None else _NOTHING, recall or _NOTHING:
        output = checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=runtime.preserve_rng_state,
            **options,
            **kwargs,
        )
    if run is not None:
        run.silence()
    return output


def _fill_once(forward: Callable[..., Any], before: list[Filled], *args: Any, **kwargs: Any) -> Any:
    """Run a forward that fills key-value caches; see NOTE [ Filling a cache twice ]."""
    if is_recomputing():
        args, kwargs = with_empty_caches(args, kwargs)
        return forward(*args, **kwargs)
    output = forward(*args, **kwargs)
    if before != [Filled(cache) for cache in caches_in((args, kwargs))]:
        raise ApplyError(
            "a recomputed module adds to a key-value cache that is not empty, which would be done "
            "twice: set use_cache=False for training, or plan with a batch that has the cache."
        )
    return output


def _contexts(
    runtime: RegionRuntime, hooks: list[HookTable], saved_ops: frozenset[tuple[str, int]]
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    first = _FirstRun(runtime, hooks)
    around: AbstractContextManager[Any] = first
    again: AbstractContextManager[Any] = _Recomputation(runtime, first)
    if saved_ops:
        saving, using = create_selective_checkpoint_contexts(  # type: ignore[no-untyped-call]
            _SaveOccurrences(saved_ops)
        )
        around, again = _Both(around, saving), _Both(again, using)
    if runtime.keeps_choices:
        choosing = Choosing()
        around, again = _Both(around, choosing), _Both(again, ChoosingAgain(choosing))
    return around, again


class _SaveOccurrences:
    """Policy of selective checkpointing: save the named occurrences of ops, recompute the rest."""

    def __init__(self, saved_ops: frozenset[tuple[str, int]]) -> None:
        self._saved_ops = saved_ops
        self._counts: dict[str, int] = {}

    def __call__(self, *call: Any, **_: Any) -> CheckpointPolicy:
        name = str(call[1])  # (context, op, *arguments)
        occurrence = self._counts.get(name, 0)
        self._counts[name] = occurrence + 1
        if (name, occurrence) in self._saved_ops:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


class _Both:
    """Two contexts, the second inside the first."""

    def __init__(
        self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]
    ) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        try:
            self._inner.__enter__()
        except BaseException:
            self._outer.__exit__(None, None, None)
            raise

    def __exit__(self, *error: object) -> None:
        kind, value, trace = error
        try:
            self._inner.__exit__(kind, value, trace)  # type: ignore[arg-type]
        finally:
            self._outer.__exit__(kind, value, trace)  # type: ignore[arg-type]


class _FirstRun:
    """Around the region's forward: keep what the recomputation must start from."""

    def __init__(self, runtime: RegionRuntime, hooks: list[HookTable]) -> None:
        self._runtime = runtime
        self._hooks = hooks
        self._saved: list[dict[int, Any]] = []
        self.observers: set[tuple[int, int]] = set()
        self.buffers: list[Tensor] = []

    def __enter__(self) -> None:
        self.buffers = [
            module._buffers[name].detach().clone()  # type: ignore[union-attr]
            for module, name in self._runtime.buffers
        ]
        self._saved = [dict(table) for table in self._hooks]
        for table in self._hooks:
            for key, hook in list(table.items()):
                if not (getattr(hook, "__module__", None) or "").startswith("torch."):
                    table[key] = functools.partial(self._observe, (id(table), key), hook)

    def _observe(
        self, key: tuple[int, int], hook: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        result = hook(*args, **kw)
        if result is None:
            self.observers.add(key)
        else:
            self.observers.discard(key)
        return result

    def __exit__(self, *_: object) -> None:
        for table, before in zip(self._hooks, self._saved, strict=True):
            for key in before.keys() & table.keys():
                table[key] = before[key]

    @property
    def hook_tables(self) -> list[HookTable]:
        """The tables of user hooks inside the region."""
        return self._hooks


class _Recomputation:
    """Around the recomputation: start from the same buffers, and let nothing happen twice.

    Buffers are swapped for copies of their values from before the forward, which the recomputation
    may update, and then swapped back: a second backward starts from the same values. User hooks
    that returned nothing have had their one call.
    """

    def __init__(self, runtime: RegionRuntime, first: _FirstRun) -> None:
        self._runtime = runtime
        self._first = first
        self._live: list[Tensor | None] = []
        self._silenced: list[tuple[dict[int, Any], int, Any]] = []

    def __enter__(self) -> None:
        _thread.depth = getattr(_thread, "depth", 0) + 1
        self._runtime.clock.in_backward = True
        for (module, name), value in zip(self._runtime.buffers, self._first.buffers, strict=True):
            self._live.append(module._buffers[name])
            module._buffers[name] = value.clone()
        for table in self._first.hook_tables:
            for key, hook in list(table.items()):
                if (id(table), key) in self._first.observers:
                    self._silenced.append((table, key, hook))
                    table[key] = _do_nothing

    def __exit__(self, *_: object) -> None:
        for (module, name), value in zip(self._runtime.buffers, self._live, strict=True):
            module._buffers[name] = value
        for table, key, hook in self._silenced:
            table[key] = hook
        self._live.clear()
        self._silenced.clear()
        _thread.depth -= 1


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


def _hook_tables(inside: tuple[nn.Module, ...], run: Run | None) -> list[HookTable]:
    """List the tables of hooks that fire inside a region, without empty ones."""
    tables = [t for m in inside for t in (m._forward_pre_hooks, m._forward_hooks) if t]
    if run is not None:
        tables += [table for table in run.hook_tables() if table]
    return tables
