"""Seconds and workspace bytes of each op of a trace, from a device table or measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from remat.trace.records import Op, OpSignature, StepTrace

if TYPE_CHECKING:
    from remat.cost.devices import Device


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What an op costs: measured where it was measured, else by the roofline of the device.

    The roofline (Williams et al. 2009, doi:10.1145/1498765.1498785) bounds an op's time from below
    by arithmetic and by traffic: max(FLOPs / peak FLOP/s, bytes / bandwidth); the device's
    dispatch overhead is added. `workspace` are bytes that a kernel takes for itself while it runs,
    which fake tensors cannot show; `None` where planning is to find out by itself.
    `host_bytes_per_s` is the measured speed of copies to and from host memory, instead of the
    device table's.
    """

    device: Device
    seconds: Mapping[OpSignature, float] = field(default_factory=dict)
    workspace: Mapping[OpSignature, int] | None = None
    host_bytes_per_s: float | None = None

    @property
    def source(self) -> str:
        """Where the seconds come from, for people."""
        if self.seconds:
            return f"measured here, {len(self.seconds)} op shapes"
        return f"roofline of device {self.device.name!r}"

    def op_seconds(self, op: Op, signature: OpSignature) -> float:
        """Estimate the seconds of one op."""
        measured = self.seconds.get(signature)
        if measured is not None:
            return measured
        arithmetic = op.flops / self.device.flops_for(op.dtype) if op.flops else 0.0
        traffic = 0.0 if op.is_view else op.moved_bytes / self.device.bandwidth_bytes_per_s
        return max(arithmetic, traffic) + self.device.op_overhead_s

    def workspace_bytes(self, signature: OpSignature) -> int:
        """Return the bytes that the op's kernel takes beside its inputs and outputs."""
        return (self.workspace or {}).get(signature, 0)


# What each op of a region costs more in eager mode when some of the region's ops are saved: two
# Python dispatch modes, one in forward and one in recomputation (measured, single thread).
SELECTIVE_OP_OVERHEAD_S = 23e-6


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds and workspace of each op of one trace, by position, and what regions add.

    `copies_overlap` says whether copies to and from the host run beside the computation.
    """

    op_seconds: tuple[float, ...]
    op_workspace: tuple[int, ...]
    forward_seconds: float
    step_seconds: float
    region_overhead_s: float
    saved_tensor_overhead_s: float
    host_bytes_per_s: float
    copies_overlap: bool


def cost_step(trace: StepTrace, model: CostModel) -> StepCost:
    """Price every op of a trace."""
    seconds = tuple(model.op_seconds(op, trace.signatures[op.signature]) for op in trace.ops)
    return StepCost(
        op_seconds=seconds,
        op_workspace=tuple(
            model.workspace_bytes(trace.signatures[op.signature]) for op in trace.ops
        ),
        forward_seconds=sum(
            s for op, s in zip(trace.ops, seconds, strict=True) if op.phase == "forward"
        ),
        step_seconds=sum(seconds),
        region_overhead_s=model.device.region_overhead_s,
        saved_tensor_overhead_s=model.device.saved_tensor_overhead_s,
        host_bytes_per_s=model.host_bytes_per_s or model.device.host_bandwidth_bytes_per_s,
        # Only CUDA and ROCm copy on a stream of their own here (see `remat.regions.offload`).
        copies_overlap=model.device.kind in ("cuda", "rocm"),
    )
