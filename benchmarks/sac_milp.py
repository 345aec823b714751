"""`torch.distributed._tools`' `sac_milp`, as found, with a cost model for the CPU patched in.

As shipped it cannot run here: its roofline asserts CUDA. `RuntimeEstimator._roofline_estimate` is
replaced by the roofline that prices ours; nothing else. Its answer, a share of each chosen module's
activations to discard, is turned into ops by its own `get_optimal_checkpointing_policy_per_module`
and applied with selective checkpointing. Where torch refuses to save what it chose (it saves the
in-place ops of dropout), its modules are checkpointed whole instead, and the row says so; with
`allow_cache_entry_mutation` torch does not refuse, and the gradients are noise. It needs pulp and
pwlf.
"""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from benchmarks.peer_step import adamw
from benchmarks.runner import Data
from benchmarks.shapes import Case, Entry
from remat.cost.devices import find_device
from remat.trace.standin import map_tensors
from remat.trace.step import compute_loss

# Any: ops, their arguments and the tool's own records are untyped.

PATCHED = "RuntimeEstimator._roofline_estimate replaced by a roofline of this CPU (it asserts CUDA)"


class SacMilp:
    """The tool's statistics of one model, from which it plans for any budget."""

    def __init__(self, entry: Entry, dropout: float) -> None:
        from torch.distributed._tools.ilp_utils import aggregate_stats, parse_module_info
        from torch.distributed._tools.mem_tracker import MemTracker
        from torch.distributed._tools.runtime_estimator import RuntimeEstimator
        from torch.distributed._tools.sac_estimator import SACEstimator

        real = entry.build(dropout=dropout)
        with FakeTensorMode(), mock.patch.object(
            RuntimeEstimator, "_roofline_estimate", classmethod(_roofline)
        ), contextlib.redirect_stdout(io.StringIO()):  # fmt: skip
            case = _faked(real)
            stepper = adamw(case.model.parameters())

            def step() -> None:
                compute_loss(case.model, case.batch, case.loss).backward()
                stepper.step()
                stepper.zero_grad()

            memory = MemTracker()
            memory.track_external(case.model, stepper)
            with memory:
                step()
                memory.reset_mod_stats()
                step()
            runtime = RuntimeEstimator()
            with runtime("operator-level-cost-model"):
                step()
            self._estimator = SACEstimator()
            with self._estimator("operator-level-cost-model"):
                compute_loss(case.model, case.batch, case.loss)
            device = torch.device("cpu")
            found = aggregate_stats(case.model, memory, runtime, self._estimator, device)
            self._graph = parse_module_info(found)

    def keep_all_bytes(self) -> int:
        """Return what the tool takes the peak without recomputation to be, without optimizer."""
        from torch.distributed._tools.ilp_utils import get_peak_memory_runtime_baseline

        return int(get_peak_memory_runtime_baseline(self._graph)[0])

    def plan(self, budget_bytes: int) -> Data:
        """Return its decisions: ops to save (1) or compute again (0), by module."""
        from torch.distributed._tools.sac_ilp import (
            get_optimal_checkpointing_policy_per_module,
            sac_milp,
        )

        decisions, milliseconds, peak = sac_milp(self._graph, memory_budget=budget_bytes / 2**30)
        if peak == -1:
            return {"error": "the tool says: infeasible"}
        saved = {}
        again_s = whole_s = 0.0
        for name, discard in decisions.items():
            stats = self._estimator.sac_mod_stats[name]
            policy = get_optimal_checkpointing_policy_per_module(stats, max(0.0, 1.0 - discard))
            saved[name.partition(".")[2]] = policy
            whole_s += sum(stats.runtimes) / 1e3
            again_s += sum(
                t for t, keeps in zip(stats.runtimes, policy, strict=True) if not keeps
            ) / 1e3  # fmt: skip
        return {
            "predicted_bytes": peak,
            "its_recompute_s": milliseconds / 1e3,
            "recompute_s": again_s,
            "whole_s": whole_s,
            "decisions": decisions,
            "saved": saved,
        }


def apply(case: Case, saved: dict[str, list[int]]) -> nn.Module:
    """Checkpoint the chosen modules, each with its ops to save, by their order of dispatch."""
    for name, policy in saved.items():
        module = case.model.get_submodule(name)
        module.forward = functools.partial(_checkpointed, module.forward, tuple(policy))
    return case.model


def _checkpointed(forward: Any, policy: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    contexts = functools.partial(_contexts, policy)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(policy: tuple[int, ...]) -> Any:
    from torch.distributed._tools.sac_estimator import OPS_TO_ALWAYS_SKIP

    position = 0

    def decide(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        del context, args, kwargs
        nonlocal position
        if func in OPS_TO_ALWAYS_SKIP:
            return CheckpointPolicy.PREFER_RECOMPUTE
        saves = position < len(policy) and policy[position] == 1
        position += 1
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.MUST_RECOMPUTE

    return create_selective_checkpoint_contexts(decide)


def _faked(real: Case) -> Case:
    """Make a case's tensors fake in place."""
    for module in real.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _fake(buffer)
    if hasattr(real.model, "tie_weights"):
        real.model.tie_weights()
    return Case(real.model, map_tensors(real.batch, _fake), real.loss)


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _roofline(cls: Any, func: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
    """Estimate an op's milliseconds as `remat.cost` does."""
    del cls
    kwargs = kwargs or {}
    out = func(*args, **kwargs)
    device = find_device("cpu")
    formula = flop_registry.get(func._overloadpacket)
    flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    is_view = any(r.alias_info is not None for r in func._schema.returns)
    traffic = 0.0 if is_view else moved / device.bandwidth_bytes_per_s
    seconds = max(flops / device.flops_for("float32"), traffic) + device.op_overhead_s
    return out, seconds * 1e3
