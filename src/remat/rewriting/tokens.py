"""Token-wise modules in slices along the tokens, so that what is wide in them exists for one slice.

Each slice is recomputed in backward, also inside a region that is recomputed itself.
"""

from __future__ import annotations

import enum
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
from remat.rewriting.trials import are_close, are_same, gradients, runs_alike
from remat.trace.records import FORWARD, StepTrace
from remat.trace.standin import untouched
from remat.trace.step import first_line

_log = logging.getLogger(__name__)


class _Trial(enum.Enum):
    """What a module in slices gives: the same bits, the same but for rounding, or other values."""

    EXACT = enum.auto()
    ROUNDED = enum.auto()
    OTHER = enum.auto()


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
    trials: dict[object, _Trial] = {}
    rewrites = []
    for name, calls in found.items():
        shortest = min(calls, key=lambda c: c.num_rows)
        is_whole = len(calls) == plain.trace.num_calls(name) and name not in taken
        slices = min(MOST_SLICES, shortest.num_rows // LEAST_ROWS)
        if not (is_whole and slices > 1 and len({c.argument for c in calls}) == 1):
            continue
        module = model.get_submodule(name)
        key = (type(module), shortest.given, *(tuple(p.shape) for p in module.parameters()))
        if key not in trials:
            trials[key] = _try(model, module, shortest, slices)
        if trials[key] is _Trial.OTHER:
            _log.info("module %r gives other values in slices", name)
            continue
        is_exact = trials[key] is _Trial.EXACT
        rewrites.append(_rewrite(plain, model, calls, slices, is_exact=is_exact))
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


def _try(model: nn.Module, module: nn.Module, wide: TokenWise, slices: int) -> _Trial:
    """Run a module whole and in slices, and compare results and gradients.

    Bits need real parameters, computed with as the step does; the rows are random. Those of its own
    parameters' gradients are sums over rows, and differ in slices.
    """
    tensors = (*module.parameters(), *module.buffers())
    is_abstract = any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in tensors)
    device = next((t.device for t in tensors), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, wide.given.dtype)
    if is_abstract:
        x = torch.empty(wide.given.shape, dtype=dtype, device="meta")
    else:
        x = torch.randn(wide.given.shape, generator=generator).to(device, dtype).requires_grad_()
    trained = [p for p in module.parameters() if p.requires_grad]
    with untouched(model), torch.enable_grad():
        try:
            parts = cut_rows(x, slices)
            if not runs_alike(module, x, [parts[0], parts[-1]]):
                return _Trial.OTHER
            if is_abstract or wide.dtypes != {wide.given.dtype}:  # autocast, entered out of sight
                return _Trial.ROUNDED
            results = module.forward(x), joined_rows([module.forward(p) for p in parts], x)
            one, other = (
                [
                    result.detach(),
                    *gradients(result, [x, *trained], torch.Generator().manual_seed(1)),
                ]
                for result in results
            )
        except Exception as error:  # noqa: BLE001  whatever a module makes of being called alone
            _log.info("a token-wise module cannot be tried: %s", first_line(error))
            return _Trial.ROUNDED
    if not are_close(one, other, _tolerance(wide, slices)):
        return _Trial.OTHER
    return _Trial.EXACT if are_same(one[:2], other[:2]) else _Trial.ROUNDED


def _tolerance(wide: TokenWise, slices: int) -> float:
    """Bound how far sums over rows differ in slices."""
    lowest = [getattr(torch, dtype) for dtype in (wide.given.dtype, *wide.dtypes)]
    return rounding_tolerance(
        max(torch.finfo(dtype).eps for dtype in lowest),
        torch.finfo(torch.promote_types(lowest[0], torch.float32)).eps,
        num_summands=wide.num_rows + wide.given.shape[-1],
        num_slices=slices,
    )


def _rewrite(
    plain: Program, model: nn.Module, calls: list[TokenWise], slices: int, *, is_exact: bool
) -> Rewrite:
    first = calls[0]
    names = plain.trace.parameter_names
    own = {n for c in calls for s in c.parameters & names.keys() for n in names[s]}
    return Rewrite(
        kind=RewriteKind.SLICED_TOKENS,
        module=plain.trace.calls[first.call].module,
        num_slices=slices,
        arguments=(first.argument,),
        affects=tuple(
            n for n, p in model.named_parameters() if p.requires_grad and (n in own or not is_exact)
        ),
        tolerance=max(_tolerance(call, slices) for call in calls),
    )
