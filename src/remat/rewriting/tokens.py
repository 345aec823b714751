"""Token-wise modules in slices along the tokens, so that what is wide in them exists for one slice.

Each slice is recomputed in backward, also inside a region that is recomputed itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from remat.planner.heads import LEAST_ROWS, LEAST_SHARE, MOST_SLICES, rounding_tolerance
from remat.planner.records import Rewrite, RewriteKind
from remat.program import Program
from remat.regions.sliced_calls import cut_rows, joined_rows
from remat.rewriting.token_wise import TokenWise, token_wise
from remat.trace.records import FORWARD, StepTrace
from remat.trace.standin import untouched
from remat.trace.step import first_line

_log = logging.getLogger(__name__)


def sliced_tokens(
    plain: Program, model: nn.Module, others: Iterable[Rewrite]
) -> tuple[Rewrite, ...]:
    """Return the rewrites that run token-wise modules in slices along the tokens: all that can be.

    Of modules inside one another the innermost is taken that has a matrix product and holds more
    than it is given and returns together, as an MLP does. `others` are rewrites of the same step,
    whose modules are left out.
    """
    found: dict[str, list[TokenWise]] = {}
    for wide in _innermost(plain.trace, _wide_calls(plain)):
        found.setdefault(plain.trace.calls[wide.call].module, []).append(wide)
    taken = {rewrite.module for rewrite in others}
    exact: dict[object, bool] = {}
    rewrites = []
    for name, calls in found.items():
        shortest = min(calls, key=lambda c: c.num_rows)
        is_whole = len(calls) == plain.trace.num_calls(name) and name not in taken
        slices = min(MOST_SLICES, shortest.num_rows // LEAST_ROWS)
        if not (is_whole and slices > 1 and len({c.argument for c in calls}) == 1):
            continue
        module = model.get_submodule(name)
        key = (type(module), shortest.given, *(tuple(p.shape) for p in module.parameters()))
        if key not in exact:
            exact[key] = _is_exact(model, module, shortest, slices)
        rewrites.append(_rewrite(plain, model, calls, slices, is_exact=exact[key]))
    return tuple(rewrites)


def _wide_calls(plain: Program) -> Iterator[TokenWise]:
    """Yield the token-wise calls with products that hold more than they are given and return."""
    trace = plain.trace
    for number, call in enumerate(trace.calls):
        if call.phase != FORWARD or not call.module or not call.uses_grad or call.stop_op < 0:
            continue
        outside = sum(trace.storages[s].size_bytes for s in {*call.inputs, *call.outputs})
        made = token_wise(trace, number)
        least = max(outside, LEAST_SHARE * plain.keep_all_peak_bytes)
        if made is not None and made.dtypes and made.held_bytes > least:
            yield made


def _innermost(trace: StepTrace, calls: Iterable[TokenWise]) -> Iterator[TokenWise]:
    listed = list(calls)
    around = set()
    for one in listed:
        parent = trace.calls[one.call].parent
        while parent >= 0:
            around.add(parent)
            parent = trace.calls[parent].parent
    return (one for one in listed if one.call not in around)


def _is_exact(model: nn.Module, module: nn.Module, wide: TokenWise, slices: int) -> bool:
    """Whether, on random rows, results and gradients of the input are the same bits in slices.

    To try it needs real parameters, computed with as the step does.
    """
    tensors = (*module.parameters(), *module.buffers())
    if any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in tensors):
        return False
    if wide.dtypes != {wide.given.dtype}:  # under autocast, entered where we do not see it
        return False
    device = next((t.device for t in tensors), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, wide.given.dtype)
    x = torch.randn(wide.given.shape, generator=generator).to(device, dtype).requires_grad_()
    with untouched(model), torch.enable_grad():
        try:
            whole = module.forward(x)
            sliced = joined_rows([module.forward(part) for part in cut_rows(x, slices)], x)
            if sliced is None or not torch.equal(whole, sliced):
                return False
            by = torch.randn(whole.shape, generator=generator).to(device, dtype)
            found = [torch.autograd.grad(result, x, by)[0] for result in (whole, sliced)]
        except Exception as error:  # noqa: BLE001  whatever a module makes of being called alone
            _log.info("a token-wise module cannot be tried: %s", first_line(error))
            return False
    return torch.equal(*found)


def _rewrite(
    plain: Program, model: nn.Module, calls: list[TokenWise], slices: int, *, is_exact: bool
) -> Rewrite:
    first = calls[0]
    names = plain.trace.parameter_names
    own = {n for c in calls for s in c.parameters & names.keys() for n in names[s]}
    lowest = [getattr(torch, dtype) for dtype in (first.given.dtype, *first.dtypes)]
    epsilon = max(torch.finfo(dtype).eps for dtype in lowest)
    return Rewrite(
        kind=RewriteKind.SLICED_TOKENS,
        module=plain.trace.calls[first.call].module,
        num_slices=slices,
        arguments=(first.argument,),
        affects=tuple(
            n for n, p in model.named_parameters() if p.requires_grad and (n in own or not is_exact)
        ),
        tolerance=rounding_tolerance(
            epsilon,
            torch.finfo(torch.promote_types(lowest[0], torch.float32)).eps,
            num_summands=max(c.num_rows for c in calls) + first.given.shape[-1],
            num_slices=slices,
        ),
    )
