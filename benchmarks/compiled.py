"""`torch._functorch.config.activation_memory_budget`: compile under it, and count what runs twice.

The partitioner splits the joint graph of forward and backward in two. A node of the forward graph
that the backward graph has as well, under the same name, runs twice: these are counted, from the
graphs themselves as the partitioner returns them, and priced by the roofline that prices ours.
Under inductor the nodes are decomposed and later fused, so that the price of what runs twice,
node by node, is above what the fused kernels take; the share of FLOPs has no such fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.runner import Data
from benchmarks.shapes import Case
from remat.cost.devices import find_device
from remat.cost.model import CostModel
from remat.trace.records import EMPTY_OPS, Op, OpSignature

# Any: graphs and their nodes' values are untyped.

_PARTITIONERS = {
    "aot_eager": "torch._dynamo.backends.debugging.min_cut_rematerialization_partition",
    "inductor": "torch._inductor.compile_fx.min_cut_rematerialization_partition",
}
_COST = CostModel(device=find_device("cpu"))
_VIEWS = frozenset({"aten::_unsafe_view", "aten::detach", "aten::alias", "aten::lift_fresh"})


class Twice:
    """Adds up the forward nodes that backward computes again, over all graphs of one model."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.flops = 0
        self.forward_flops = 0
        self.num_ops = 0
        self.num_random = 0

    def count(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        """Count one pair of graphs."""
        known = {node.name for node in forward.graph.nodes if _is_op(node)}
        for node in forward.graph.nodes:
            if _is_op(node):
                self.forward_flops += _price(node)[1]
        for node in backward.graph.nodes:
            if not _is_op(node) or node.name not in known:
                continue
            seconds, flops = _price(node)
            self.seconds += seconds
            self.flops += flops
            self.num_ops += 1
            self.num_random += torch.Tag.nondeterministic_seeded in node.target.tags


@contextlib.contextmanager
def memory_budget(backend: str, fraction: float, solver: str) -> Iterator[Twice]:
    """Set the budget while a model is compiled, and watch the partitioner."""
    twice = Twice()
    where = _PARTITIONERS[backend]
    original: Any = None

    def watched(*args: Any, **kwargs: Any) -> Any:
        forward, backward = original(*args, **kwargs)
        twice.count(forward, backward)
        return forward, backward

    torch._dynamo.reset()
    module, _, name = where.rpartition(".")
    __import__(module)
    import sys

    original = getattr(sys.modules[module], name)
    with (
        mock.patch(where, watched),
        functorch_config.patch(
            activation_memory_budget=fraction, activation_memory_budget_solver=solver
        ),
        # The same random numbers as eager mode, so that dropout can be compared; no helpers.
        inductor_config.patch(fallback_random=True, compile_threads=1),
    ):
        yield twice


def compiled(case: Case, backend: str) -> nn.Module:
    """Compile a case's model; the first step does the work."""
    made: nn.Module = torch.compile(case.model, backend=backend)  # type: ignore[assignment]
    return made


def as_data(twice: Twice, forward_seconds: float) -> Data:
    """Return what runs twice, relative to the forward pass of eager mode."""
    return {
        "fraction": twice.seconds / forward_seconds,
        "flop_fraction": twice.flops / twice.forward_flops if twice.forward_flops else None,
        "num_recomputed_ops": twice.num_ops,
        "num_recomputed_random_ops": twice.num_random,
    }


def _is_op(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _price(node: fx.Node) -> tuple[float, int]:
    """Return the seconds and FLOPs of a node, as `remat.cost` prices an op of these shapes."""
    operator: Any = node.target
    values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    args, kwargs = values
    out = node.meta.get("val")
    formula = flop_registry.get(operator._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
    tensors = [t for t in tree_leaves((values, out)) if isinstance(t, torch.Tensor)]
    made = [] if _is_view(operator) else [0]
    is_empty = str(operator) in EMPTY_OPS
    moved = 0 if is_empty else sum(t.numel() * t.element_size() for t in tensors)
    floating = next((t.dtype for t in tensors if t.is_floating_point()), None)
    op = Op(
        tick=0, name=str(operator), signature=0, call=-1, phase="forward", flops=flops,
        moved_bytes=moved, inputs=(),
        fresh=tuple(made), mutated=(), is_random=False,
        dtype=str(floating).removeprefix("torch.") if floating is not None else "",
    )  # fmt: skip
    return _COST.op_seconds(op, OpSignature(op.name, (), ())), flops


def _is_view(operator: Any) -> bool:
    schema = operator._schema
    return schema.name in _VIEWS or any(r.alias_info is not None for r in schema.returns)
