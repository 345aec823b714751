"""Loss heads in slices: the projection to classes together with its cross entropy."""

from __future__ import annotations

import torch
from torch import nn

from remat.planner.heads import LEAST_SHARE, LossHead, find_heads, rounding_tolerance
from remat.planner.records import Rewrite
from remat.program import Program
from remat.regions.rewrites import is_sliceable_head


def sliced_heads(plain: Program, model: nn.Module) -> tuple[Rewrite, ...]:
    """Return the rewrites that run each loss head with its loss in slices.

    What between a head and its loss needs the whole logits cannot be seen in the plain trace; where
    there is such a thing, the rewritten step peaks no lower.
    """
    worth = LEAST_SHARE * plain.keep_all_peak_bytes
    return tuple(
        _rewrite(plain, model, head)
        for head in find_heads(plain.trace, _linear_modules(model))
        if head.num_rows * head.row_bytes >= worth
    )


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
