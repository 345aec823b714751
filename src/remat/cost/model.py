"""Seconds and workspace bytes of each op of a trace, from a device table or measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from remat.cost.calibration import Calibration
from remat.trace.records import FORWARD, Op, OpSignature, StepTrace

if TYPE_CHECKING:
    from remat.cost.devices import Device


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What an op costs: measured, else by the device's calibration, else by its roofline.

    The roofline (Williams et al. 2009, doi:10.1145/1498765.1498785) bounds an op's time from below
    by arithmetic and by traffic: max(FLOPs / peak FLOP/s, bytes / bandwidth); the device's
    dispatch overhead is added. `workspace` are bytes that a kernel takes for itself while it runs,
    which fake tensors cannot show; `None` where planning is to find out by itself.
    `host_bytes_per_s` is the measured speed of copies to and from host memory, instead of the
    device table's, and `copies_overlap` whether they run beside the computation, instead of what
    its kind says. `calibration` is what `remat.calibrate` measured on the device. Without
    `counts_bookkeeping` a plan runs the least again, whatever else it adds.
    """

    device: Device
    seconds: Mapping[OpSignature, float] = field(default_factory=dict)
    workspace: Mapping[OpSignature, int] | None = None
    host_bytes_per_s: float | None = None
    copies_overlap: bool | None = None
    calibration: Calibration | None = None
    counts_bookkeeping: bool = True

    @property
    def source(self) -> str:
        """Where the seconds come from, for people; the first word says the kind of source."""
        if self.seconds:
            found = f"measured here, {len(self.seconds)} op shapes"
        elif self.calibration is not None:
            found = f"calibrated on {self.calibration.hardware}, {self.calibration.created[:10]}"
        else:
            found = f"roofline of device {self.device.name!r}, not calibrated"
        return found if self.counts_bookkeeping else f"{found}, without bookkeeping"

    def op_seconds(self, op: Op, signature: OpSignature) -> float:
        """Estimate the seconds of one op."""
        measured = self.seconds.get(signature)
        if measured is not None:
            return measured
        if self.calibration is not None:
            found = self.calibration.op_seconds(
                signature, op.dtype, op.flops, 0 if op.is_view else op.moved_bytes
            )
            if found is not None:
                return found
        arithmetic = op.flops / self.device.flops_for(op.dtype) if op.flops else 0.0
        traffic = 0.0 if op.is_view else op.moved_bytes / self.device.bandwidth_bytes_per_s
        return max(arithmetic, traffic) + self.device.op_overhead_s

    def workspace_bytes(self, signature: OpSignature) -> int:
        """Return the bytes that the op's kernel takes beside its inputs and outputs."""
        return (self.workspace or {}).get(signature, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookkeeping:
    """Seconds that a plan adds to a step beside the ops that run again.

    `region` is that of each recomputed region, `saved_tensor` of each tensor saved inside one.
    Where single results are dropped, `watched_op` is that of each op of the call (one dispatch mode
    in forward), `watched_tensor` of each tensor that is saved there, and `dropped_op` of a note of
    its arguments and of finding them. Packing takes `packed_op` for each op, `packing_byte` for
    each byte that is moved and `packing_kernel` for each kernel that moves them. The defaults are
    measured, single thread.
    """

    region: float
    saved_tensor: float
    packing_byte: float
    packing_kernel: float
    watched_op: float = 8e-6
    watched_tensor: float = 3e-6
    dropped_op: float = 24e-6
    packed_op: float = 14e-6

    @classmethod
    def none(cls) -> Bookkeeping:
        """Return that of a plan for which nothing but recomputation counts."""
        return cls(**{entry.name: 0.0 for entry in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds and workspace of each op of one trace, by position, and what regions add.

    `copies_overlap` says whether copies to and from the host run beside the computation.
    """

    op_seconds: tuple[float, ...]
    op_workspace: tuple[int, ...]
    forward_seconds: float
    step_seconds: float
    bookkeeping: Bookkeeping
    host_bytes_per_s: float
    copies_overlap: bool


def cost_step(trace: StepTrace, model: CostModel) -> StepCost:
    """Price every op of a trace."""
    seconds = tuple(model.op_seconds(op, trace.signatures[op.signature]) for op in trace.ops)
    host_bytes_per_s = (
        model.device.host_bandwidth_bytes_per_s
        if model.calibration is None
        else model.calibration.host_bytes_per_s
    )
    # Only CUDA and ROCm copy on a stream of their own here (see `remat.regions.offload`).
    has_streams = model.device.kind in ("cuda", "rocm")
    return StepCost(
        op_seconds=seconds,
        op_workspace=tuple(
            model.workspace_bytes(trace.signatures[op.signature]) for op in trace.ops
        ),
        forward_seconds=sum(
            s for op, s in zip(trace.ops, seconds, strict=True) if op.phase == "forward"
        ),
        step_seconds=sum(seconds),
        bookkeeping=_bookkeeping(model) if model.counts_bookkeeping else Bookkeeping.none(),
        host_bytes_per_s=model.host_bytes_per_s or host_bytes_per_s,
        copies_overlap=has_streams if model.copies_overlap is None else model.copies_overlap,
    )


def _bookkeeping(model: CostModel) -> Bookkeeping:
    measured = model.calibration or model.device
    copying_s = model.op_seconds(_COPY, OpSignature(_COPY.name, (), ()))
    return Bookkeeping(
        region=measured.region_overhead_s,
        saved_tensor=measured.saved_tensor_overhead_s,
        packing_byte=copying_s / _COPY.moved_bytes,
        packing_kernel=model.device.op_overhead_s,
    )


# A pass over memory, large enough that what each op takes beside does not count.
_COPY = Op(
    tick=0, name="aten.copy_.default", signature=0, call=-1, phase=FORWARD, flops=0,
    moved_bytes=2**26, inputs=(), fresh=(), mutated=(0,), is_random=False, dtype="float32",
)  # fmt: skip
