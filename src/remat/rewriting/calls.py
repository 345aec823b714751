"""Blocks in slices of the batch: micro-batching without a change to the loss, as a last resort."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from remat.planner.heads import rounding_tolerance
from remat.planner.records import Rewrite, RewriteKind
from remat.program import Program, Step
from remat.regions.sliced_calls import cut_arguments, joined
from remat.rewriting.trials import are_close, gradients
from remat.trace.caches import caches_in
from remat.trace.capture import capture
from remat.trace.records import FORWARD, Call
from remat.trace.standin import untouched
from remat.trace.step import first_line
from remat.trace.values import value_of

# Any: a module's arguments and results are the user's own.

_log = logging.getLogger(__name__)

MOST_SLICES = 8
_EXAMPLES = 2  # rows that a block is tried on
_CLOSE = 256.0  # roundings by which one row may differ from itself in a smaller batch


def sliced_blocks(plain: Program, step: Step) -> tuple[Rewrite, ...]:
    """Return the rewrites that run blocks in slices of the batch: every one that can be.

    A block can be sliced where each example's result is its own: nothing in the step updates
    buffers (batch statistics), nothing in the block draws random numbers, and the block itself, run
    on two random examples together and apart, gives the same results but for rounding. That needs
    its real parameters: meta and fake models are not sliced.
    """
    trace = plain.trace
    blocks = [trace.calls[plain.options[position].call] for position in plain.blocks]
    updates = any(s in trace.buffer_names for op in trace.ops for s in op.mutated)
    fitting = [call for call in blocks if not updates and _is_sliceable(plain, call)]
    names = [call.module for call in fitting]
    if not names or any(_is_abstract(step.model.get_submodule(name)) for name in names):
        return ()
    calls = _arguments_of(step, names)
    found = []
    for call in fitting:
        name = call.module
        places = _batched(calls[name])
        if not places or not _is_row_wise(step.model, name, calls[name], places):
            _log.info("block %r cannot run in slices of the batch", name)
            continue
        chooses = any(map(trace.chooses, trace.ops[call.first_op : call.stop_op]))
        found.append(
            _rewrite(
                step.model, name, calls[name], places,
                num_blocks=len(names), keeps_choices=chooses,
            )
        )  # fmt: skip
    return tuple(found)


def _is_sliceable(plain: Program, call: Call) -> bool:
    trace = plain.trace
    ops = trace.ops[call.first_op : call.stop_op]
    written = {storage for op in ops for storage in op.mutated}
    return (
        not any(op.is_random for op in ops)
        and written.isdisjoint(call.inputs)
        and not (call.draws_python_random or call.moves_random_state)
        and not call.changed_state
        and trace.num_calls(call.module) == 1
        and call.phase == FORWARD
    )


def _is_abstract(module: nn.Module) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in tensors)


def _arguments_of(step: Step, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """Return the (fake) arguments of each module's call, from one more trace."""
    found: dict[str, tuple[Any, Any]] = {}

    def note(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found.setdefault(name, (args, kwargs))
        return forward(*args, **kwargs)

    with untouched(step.model):
        for name in names:
            module = step.model.get_submodule(name)
            module.__dict__["forward"] = functools.partial(note, name, module.forward)
        capture(step.model, step.batch, loss=step.loss, optimizer=None)
    return found


def _batched(call: tuple[Any, Any]) -> tuple[int, ...]:
    """Return the places of the tensors along the batch, the first dimension of the first one."""
    if caches_in(call):
        return ()
    leaves, _ = tree_flatten(call)
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not tensors or not tensors[0][1].dim() or not tensors[0][1].is_floating_point():
        return ()
    size = tensors[0][1].shape[0]
    if size < _EXAMPLES:
        return ()
    return tuple(place for place, leaf in tensors if leaf.dim() and leaf.shape[0] == size)


def _is_row_wise(
    model: nn.Module, name: str, call: tuple[Any, Any], places: tuple[int, ...]
) -> bool:
    """Run a block on random examples together and one by one; compare results and gradients."""
    module = model.get_submodule(name)
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    leaves, structure = tree_flatten(call)
    generator = torch.Generator().manual_seed(0)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            made = _example(leaf, is_batched=place in places, generator=generator)
            if made is None:
                return False
            leaves[place] = made.to(device).requires_grad_(made.is_floating_point())
    example = tree_unflatten(leaves, structure)
    floating = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    wanted = [*floating, *(p for p in module.parameters() if p.requires_grad)]
    with untouched(model), torch.enable_grad():
        try:
            together = module.forward(*example[0], **example[1])
            apart = [
                module.forward(*given, **named)
                for given, named in cut_arguments(example, places, _EXAMPLES) or ()
            ]
            results = together, joined(apart)
            if not _close(*tree_map_only(Tensor, Tensor.detach, results)):
                return False
            one, other = (
                gradients(result, wanted, torch.Generator().manual_seed(1)) for result in results
            )
        except Exception as error:  # noqa: BLE001  whatever a block makes of a smaller batch
            _log.info("block %r fails on a slice of the batch: %s", name, first_line(error))
            return False
    dtypes = {t.dtype for t in wanted}
    return are_close(one, other, _CLOSE * max(torch.finfo(dtype).eps for dtype in dtypes))


def _example(leaf: Tensor, *, is_batched: bool, generator: torch.Generator) -> Tensor | None:
    """Make an argument for two examples: random, or the known values of positions and masks."""
    if not leaf.is_floating_point():
        value = value_of(leaf)
        return value[:_EXAMPLES] if value is not None and is_batched else value
    shape = (_EXAMPLES, *leaf.shape[1:]) if is_batched else tuple(leaf.shape)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(leaf.dtype)


def _close(together: Any, apart: Any) -> bool:
    """Whether all results are tensors along the batch, equal but for rounding."""
    pairs = list(zip(tree_flatten(together)[0], tree_flatten(apart)[0], strict=True))
    for one, other in pairs:
        if one is None:
            continue
        if not isinstance(one, Tensor) or not one.is_floating_point():
            return False
        if one.shape != other.shape or not one.dim() or one.shape[0] != _EXAMPLES:
            return False
        allowed = _CLOSE * torch.finfo(one.dtype).eps * float(one.abs().max())
        if not bool((one - other).abs().max() <= allowed):
            return False
    return bool(pairs)


def _rewrite(
    model: nn.Module,
    name: str,
    call: tuple[Any, Any],
    places: tuple[int, ...],
    *,
    num_blocks: int,
    keeps_choices: bool,
) -> Rewrite:
    first = tree_flatten(call)[0][places[0]]
    num_slices = min(MOST_SLICES, first.shape[0])
    wide = torch.promote_types(first.dtype, torch.float32)
    return Rewrite(
        kind=RewriteKind.SLICED_CALL,
        module=name,
        num_slices=num_slices,
        arguments=places,
        affects=tuple(n for n, p in model.named_parameters() if p.requires_grad),
        tolerance=rounding_tolerance(
            torch.finfo(_lowest(first)).eps,
            torch.finfo(wide).eps,
            num_summands=first.numel() // first.shape[-1] + first.shape[-1],
            num_slices=num_slices * num_blocks,
        ),
        keeps_choices=keeps_choices,
    )


def _lowest(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
