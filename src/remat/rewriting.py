"""Rewriting: the other programs that a traced step could run, with its loss heads in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from remat.planner.heads import LEAST_SHARE, LossHead, find_heads, rounding_tolerance
from remat.planner.records import Rewrite
from remat.program import Program
from remat.regions.rewrites import is_sliceable_head
from remat.units import format_bytes, format_seconds

_MOST_NAMED = 3  # parameters in a note


def sliced_programs(
    plain: Program, model: nn.Module, make: Callable[[tuple[Rewrite, ...]], Program]
) -> tuple[Program, ...]:
    """Trace the step with its loss heads in slices; empty where that frees nothing.

    What between a head and its loss needs the whole logits cannot be seen in the plain trace; where
    there is such a thing, the rewritten step peaks no lower and is dropped.
    """
    worth = LEAST_SHARE * plain.keep_all_peak_bytes
    heads = [
        head
        for head in find_heads(plain.trace, _linear_modules(model))
        if head.num_rows * head.row_bytes >= worth
    ]
    if not heads:
        return ()
    program = make(tuple(_rewrite(plain, model, head) for head in heads))
    if program.keep_all_peak_bytes >= plain.keep_all_peak_bytes:
        return ()
    program.rewrites = _with_reasons(plain, program)
    return (program,)


def rewrite_notes(rewrites: Iterable[Rewrite]) -> list[str]:
    """Say for which parameters bit identity is given up, and by how much."""
    notes = []
    for rewrite in rewrites:
        named = ", ".join(rewrite.affects[:_MOST_NAMED])
        others = len(rewrite.affects) - _MOST_NAMED
        named += f" and {others} more" if others > 0 else ""
        notes.append(
            f"Bit identity is given up: {rewrite.module} and its loss run in {rewrite.num_slices} "
            f"slices, so that the loss and the gradients of {len(rewrite.affects)} parameters "
            f"({named}) are summed in another order; expected to differ by at most "
            f"{rewrite.tolerance:.1e} of their largest value."
        )
    return notes


def _linear_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Map each plain linear module to its number of classes and the bytes of one logit."""
    found = {}
    for name, module in model.named_modules():
        if name and is_sliceable_head(module):
            assert isinstance(module, nn.Linear)
            dtype = _head_dtype(module.weight)
            found[name] = (module.weight.shape[0], dtype.itemsize)
    return found


def _head_dtype(weight: torch.Tensor) -> torch.dtype:
    kind = "cpu" if weight.device.type == "meta" else weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _rewrite(plain: Program, model: nn.Module, head: LossHead) -> Rewrite:
    weight = model.get_submodule(head.module).weight
    assert isinstance(weight, torch.Tensor)
    wide = torch.promote_types(weight.dtype, torch.float32)
    names = plain.trace.parameter_names
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return Rewrite(
        module=head.module,
        num_slices=head.num_slices,
        affects=tuple(
            name
            for storage in sorted(head.sources & names.keys())
            for name in names[storage]
            if name in trained
        ),
        tolerance=rounding_tolerance(
            torch.finfo(_head_dtype(weight)).eps,
            torch.finfo(wide).eps,
            num_summands=head.num_rows + sum(weight.shape),
            num_slices=head.num_slices,
        ),
    )


def _with_reasons(plain: Program, program: Program) -> tuple[Rewrite, ...]:
    """Write down what the rewrites, together, free and cost; told at the first."""
    freed = plain.keep_all_peak_bytes - program.keep_all_peak_bytes
    added = program.cost.step_seconds - plain.cost.step_seconds
    first, *rest = program.rewrites
    change = "costs" if added > 0 else "saves"
    reason = (
        f"head and loss in {first.num_slices} slices: the peak of the step without recomputation "
        f"is {format_bytes(freed)} lower, {change} {format_seconds(abs(added))}"
    )
    update = {"freed_bytes": freed, "added_seconds": added, "reason": reason}
    return (
        first.model_copy(update=update),
        *(r.model_copy(update={"reason": f"with {first.module}"}) for r in rest),
    )
