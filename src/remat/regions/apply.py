"""Apply: put a plan's regions onto a model, and take them off again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from typing_extensions import Self

from remat.errors import ApplyError, PlanMismatchError, RematError
from remat.planner.records import Plan, Region, Rewrite
from remat.regions.dropping import DroppedOps
from remat.regions.fingerprint import check_model_matches, device_type_of
from remat.regions.guards import must_run_eagerly
from remat.regions.offload import Board, Key
from remat.regions.pool import HostPool
from remat.regions.prefetch import Entered, entered_forward
from remat.regions.quiet import silence, unsilence
from remat.regions.recall import called
from remat.regions.rewrites import HeadRuntime, install_rewrite, rewrite_on
from remat.regions.runs import Follower, Run, follower_forward
from remat.regions.runtime import Offloads, RegionRuntime, StepClock, region_forward
from remat.regions.sliced_calls import CallRuntime
from remat.trace.step import check_model

_State = RegionRuntime | Follower | Entered | HeadRuntime | CallRuntime


class Handle:
    """The plan on a model; `remove()` restores the model exactly, and may be called again.

    Also a context manager: the plan holds inside the `with` block.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = model
        self.plan = plan

    def remove(self) -> None:
        """Take the plan off the model."""
        remove(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<remat.Handle: {self.plan.summary()}>"


def apply(model: nn.Module, plan: Plan) -> Handle:
    """Put a plan onto a model, without a change to its code, class, names or `state_dict`.

    The regions hold wherever gradients are recorded; under `torch.no_grad()` the model runs as it
    is. The model can be saved, loaded, copied and pickled with the plan on.

    Raises
    ------
    WorkloadError: if the model is none.
    PlanMismatchError: if the plan was made for another model or version; names the difference.
    ApplyError: if a plan is on the model already, or what is given is no plan.

    Example
    -------
    ```python
    handle = remat.apply(model, plan)
    ...  # train as before
    handle.remove()
    ```
    """
    check_model(model)
    check_plan(plan)
    check_model_matches(model, plan.fingerprint)
    if plan.replaces_checkpointing and not is_applied(model):
        silence(model)
    try:
        install(model, plan.regions, plan.rewrites, host_budget_bytes=plan.host_budget_bytes)
    except RematError:
        if not is_applied(model):
            unsilence(model)
        raise
    return Handle(model, plan)


def check_plan(plan: Any) -> None:
    """Refuse what is no plan.

    Raises
    ------
    ApplyError: saying how to get one.
    """
    if not isinstance(plan, Plan):
        raise ApplyError(
            f"plan must be a remat.Plan, got {type(plan).__name__}: make one with remat.plan, or "
            "read a file with remat.Plan.load."
        )


def is_applied(model: nn.Module) -> bool:
    """Whether a plan is on the model."""
    return any(_installed(module) is not None for module in model.modules())


def host_pool(model: nn.Module) -> HostPool | None:
    """Return the host memory of the plan on a model, if it offloads anything."""
    for module in model.modules():
        installed = _installed(module)
        while installed is not None:
            if isinstance(installed, RegionRuntime) and installed.offloads is not None:
                return installed.offloads.pool
            installed = _state_of(installed.replaced)
    return None


def host_peak_bytes(model: nn.Module) -> int:
    """Return the most bytes of host memory that the plan on a model has taken at any time."""
    pool = host_pool(model)
    return 0 if pool is None else pool.peak_bytes


def remove(model: nn.Module) -> None:
    """Take any plan off a model, also off a copy of one that has a handle.

    Host memory of the plan is freed, except for what a backward still to come needs.
    """
    pool = host_pool(model)
    if pool is not None:
        pool.close()
    for module in model.modules():
        while (installed := _installed(module)) is not None:
            if installed.replaced is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = installed.replaced
    unsilence(model)


def install(
    model: nn.Module,
    regions: tuple[Region, ...],
    rewrites: tuple[Rewrite, ...] = (),
    *,
    host_budget_bytes: int | None = None,
) -> None:
    """Put rewrites onto a model, and regions around them; `remove` takes both off."""
    if is_applied(model):
        raise ApplyError(
            "a plan is on this model already: call handle.remove() before applying another."
        )
    modules = dict(model.named_modules())
    buffers = _buffer_homes(model)
    _check_regions(regions, modules, buffers)
    try:
        for rewrite in rewrites:
            install_rewrite(modules, rewrite)
    except PlanMismatchError:
        remove(model)
        raise
    together: dict[tuple[object, ...], list[Region]] = {}
    for region in regions:
        key = (region.module, region.followers, region.is_nested)
        together.setdefault(key, []).append(region)
    clock = StepClock()
    pool, device_type = HostPool(host_budget_bytes), device_type_of(model)
    board = Board()
    _watch_entries(modules, regions, clock, board)  # inside every region: see NOTE [ Entered ]
    # The inner before the outer: a region wraps what is on its modules already.
    for chosen in reversed(together.values()):
        first = chosen[0]
        module = modules[first.module]
        calls = frozenset(region.call for region in chosen)
        mutated = dict.fromkeys(b for region in chosen for b in region.mutated_buffers)
        run = None
        if first.followers:
            members = tuple(modules[name] for name in (first.module, *first.followers))
            run = Run(members, first.argument, first.result)
            for member in members[1:]:
                _replace(member, follower_forward, Follower(run, member.__dict__.get("forward")))
        homes = tuple(home for b in mutated for home in buffers[b])
        draws_python_random = any(region.draws_python_random for region in chosen)
        keeps_choices = any(region.keeps_choices for region in chosen)
        offloaded = {r.call: r.offload for r in chosen if r.offload is not None}
        kept = frozenset(region.call for region in chosen if not region.is_recomputed)
        runtime = RegionRuntime(
            clock=clock,
            calls=None if len(calls) == first.num_calls else calls,
            num_calls=first.num_calls,
            saved_ops={
                region.call: frozenset((op.name, op.occurrence) for op in region.saved_ops)
                for region in chosen
                if region.saved_ops
            },
            dropped_ops={
                region.call: DroppedOps(
                    frozenset((op.name, op.occurrence) for op in region.dropped_ops),
                    frozenset((op.name, op.occurrence) for op in region.packed_ops),
                )
                for region in chosen
                if region.dropped_ops or region.packed_ops
            },
            preserve_rng_state=any(region.draws_random_numbers for region in chosen),
            draws_python_random=draws_python_random,
            keeps_choices=keeps_choices,
            is_eager=(
                draws_python_random
                or keeps_choices
                or must_run_eagerly(homes)
                or first.is_nested
                or run is not None
                or any(region.spans_blocks for region in chosen)
            ),
            buffers=homes,
            replaced=module.__dict__.get("forward"),
            name=called(module, first.module),
            run=run,
            is_nested=first.is_nested,
            offloads=(
                Offloads(first.module, pool, board, device_type, offloaded, kept)
                if offloaded
                else None
            ),
        )
        _replace(module, region_forward, runtime)
    if not regions:
        # Nothing to recompute: the plan is on the model all the same, until it is removed.
        idle = RegionRuntime(clock, calls=frozenset(), replaced=model.__dict__.get("forward"))
        _replace(model, region_forward, idle)


def _watch_entries(
    modules: Mapping[str, nn.Module], regions: tuple[Region, ...], clock: StepClock, board: Board
) -> None:
    """Have the modules watched at which others' tensors are fetched."""
    wanted: dict[tuple[str, int], dict[int, tuple[Key, ...]]] = {}
    for region in regions:
        early = None if region.offload is None else region.offload.prefetch
        if early is not None:
            calls = wanted.setdefault((early.module, early.num_calls), {})
            key = (region.module, region.call)
            calls[early.call] = (*calls.get(early.call, ()), key)
    for (name, num_calls), fetches in wanted.items():
        counter = RegionRuntime(clock, calls=frozenset(fetches), num_calls=num_calls)
        module = modules[name]
        entered = Entered(counter, fetches, board, module.__dict__.get("forward"))
        _replace(module, entered_forward, entered)


def _replace(
    module: nn.Module, forward: Callable[..., Any], state: RegionRuntime | Follower | Entered
) -> None:
    module.__dict__["forward"] = functools.partial(forward, module, state)


def _check_regions(
    regions: tuple[Region, ...], modules: Mapping[str, nn.Module], buffers: Mapping[str, object]
) -> None:
    for region in regions:
        if region.module not in modules:
            raise PlanMismatchError(
                f"the plan recomputes module {region.module!r}, which the model has not."
            )
        if not region.is_recomputed and region.offload is None:
            raise PlanMismatchError(
                f"the plan neither recomputes nor offloads module {region.module!r}: make the "
                "plan again with remat.plan."
            )
        if region.call >= region.num_calls:
            raise PlanMismatchError(
                f"the plan recomputes call {region.call} of {region.module!r}, which it says is "
                f"called {region.num_calls} times (from 0): make the plan again with remat.plan."
            )
        early = None if region.offload is None else region.offload.prefetch
        if early is not None and early.module not in modules:
            raise PlanMismatchError(
                f"the plan fetches what {region.module!r} has on the host at module "
                f"{early.module!r}, which the model has not."
            )
        for name in region.followers:
            if name not in modules:
                raise PlanMismatchError(
                    f"the plan recomputes module {name!r} in a run, which the model has not."
                )
        for name in (region.module, *region.followers) if region.followers else ():
            if has_backward_hooks(modules[name]):
                raise ApplyError(
                    f"module {name!r} has backward hooks, which a run of modules that is "
                    "recomputed as one would call twice: remove the hooks, or put them on first "
                    "and make the plan again."
                )
        for name in region.mutated_buffers:
            if name not in buffers:
                raise PlanMismatchError(
                    f"the plan has buffer {name!r} updated by {region.module!r}, but the model "
                    "has no such buffer."
                )


def _buffer_homes(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Map each buffer's name to every (module, attribute) that holds the same tensor."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                homes.setdefault(id(buffer), []).append((module, name))
                names[f"{prefix}.{name}" if prefix else name] = id(buffer)
    return {name: homes[key] for name, key in names.items()}


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has backward hooks, which no run of modules may contain."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _installed(module: nn.Module) -> _State | None:
    return _state_of(module.__dict__.get("forward")) or rewrite_on(module)


def _state_of(forward: Any) -> RegionRuntime | Follower | Entered | None:  # Any: the user's own
    if isinstance(forward, functools.partial) and forward.func in (
        region_forward,
        follower_forward,
        entered_forward,
    ):
        state = forward.args[1]
        assert isinstance(state, (RegionRuntime, Follower, Entered))
        return state
    return None
