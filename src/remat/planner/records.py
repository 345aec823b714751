"""Plans as data: what is decided for each region, what it costs, and what it was made for."""

from __future__ import annotations

import enum
import os
from pathlib import Path

from pydantic import Field

from remat.cost.calibration import ErrorBar
from remat.files import Record
from remat.units import format_bytes, format_seconds


class Outcome(str, enum.Enum):
    """How the search for a plan ended."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    TIMED_OUT = "timed_out"

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return {
            Outcome.OPTIMAL: "No plan of the kinds considered recomputes less within the budget.",
            Outcome.FEASIBLE: "The plan keeps the budget; a cheaper one of these kinds may exist.",
            Outcome.TIMED_OUT: "The search ran out of time; this is the best plan found so far.",
        }[self]


class TensorSignature(Record):
    """Name, shape and dtype of one parameter, buffer or batch entry."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Fingerprint(Record):
    """What a plan was made for; applying it elsewhere is refused."""

    model_class: str
    parameters: tuple[TensorSignature, ...]
    buffers: tuple[TensorSignature, ...]
    batch: tuple[TensorSignature, ...]
    device_type: str
    training: bool
    autocast_dtype: str | None = None
    loss: str
    optimizer: str | None
    torch_version: str
    remat_version: str


class SavedOp(Record):
    """One op of a region whose result is kept: the `occurrence`-th call of that op within it."""

    name: str
    occurrence: int = Field(ge=0)


class Prefetch(Record):
    """Copies back to the device that begin before they are read.

    They begin when backward comes to the result of a module call further on, whatever is decided
    for that one.
    """

    module: str = Field(description="Module whose result backward comes to.")
    call: int = Field(default=0, ge=0, description="Which call of that module within one step.")
    num_calls: int = Field(default=1, ge=1, description="Calls of that module within one step.")
    num_tensors: int = Field(ge=1, description="How many, in the order of `tensors`.")


class Offload(Record):
    """What one module call keeps in host memory between forward and backward.

    Of a call that is not recomputed: tensors that it saves for backward; of one that is: its
    inputs.
    """

    tensors: tuple[int, ...] = Field(
        description="Which of them, counted from 0 as they are saved, without empty ones: one for "
        "each piece of memory, in the order in which backward reads them."
    )
    host_bytes: int = Field(ge=0, description="Bytes of host memory that they take.")
    transfer_seconds: float = Field(
        default=0.0, ge=0, description="Time of the copies that no computation hides."
    )
    prefetch: Prefetch | None = Field(
        default=None, description="What is fetched before it is read; none: when it is read."
    )


class Region(Record):
    """One decision: a module call whose activations are dropped and recomputed in backward.

    With `offload` its inputs wait in host memory; where it is not `is_recomputed`, what it saved
    waits there instead, and nothing runs again.

    With `dropped_ops` or `packed_ops` it is not run again as a whole: the results of the former are
    dropped, and each is made again when backward reads it; those of the latter are kept in fewer
    bits, and come back from these.

    With `followers` it is a run: consecutive calls, each given what the one before returned, that
    are dropped and recomputed as one.
    """

    module: str = Field(description="Fully qualified name of the module.")
    call: int = Field(default=0, ge=0, description="Which call of that module within one step.")
    num_calls: int = Field(default=1, ge=1, description="Calls of that module within one step.")
    followers: tuple[str, ...] = Field(
        default=(), description="Modules called next, which are part of the region."
    )
    argument: int = Field(
        default=0, ge=0, description="Which leaf of a follower's arguments is passed on."
    )
    result: int = Field(
        default=0, ge=0, description="Which leaf of a member's result is passed on."
    )
    is_nested: bool = Field(
        default=False, description="It lies in another region, and runs again inside that one's."
    )
    draws_random_numbers: bool = Field(
        default=False, description="Random state is saved and restored around the recomputation."
    )
    draws_python_random: bool = Field(
        default=False,
        description="The states of Python's and NumPy's generators are saved and restored, too.",
    )
    mutated_buffers: tuple[str, ...] = Field(
        default=(), description="Buffers that the region updates; they are updated exactly once."
    )
    keeps_choices: bool = Field(
        default=False,
        description="What its ops choose (the experts of a router) is kept, so that running again "
        "cannot choose otherwise.",
    )
    saved_ops: tuple[SavedOp, ...] = Field(
        default=(), description="Ops whose results are kept; the rest is recomputed."
    )
    dropped_ops: tuple[SavedOp, ...] = Field(
        default=(),
        description="Ops whose results alone are dropped and made again, one by one; the module's "
        "forward does not run again.",
    )
    packed_ops: tuple[SavedOp, ...] = Field(
        default=(),
        description="Ops whose results are kept in fewer bits, without loss: what a dropout drew, "
        "booleans, positions of a pooling.",
    )
    packed_bytes: int = Field(default=0, ge=0, description="Bytes that the packed results take.")
    packing_seconds: float = Field(
        default=0.0, ge=0, description="Time of packing and unpacking, part of the overhead."
    )
    spans_blocks: bool = Field(
        default=False,
        description="It is the model, or holds several of its blocks: under torch.compile it "
        "runs eagerly.",
    )
    is_recomputed: bool = Field(
        default=True, description="Its forward runs again; else what it saved is offloaded."
    )
    offload: Offload | None = Field(default=None, description="What it keeps in host memory.")
    freed_bytes: int = Field(default=0, description="Bytes that the region frees at the peak.")
    recompute_seconds: float = Field(default=0.0, description="Cost of recomputing it once.")
    reason: str = ""


class RewriteKind(str, enum.Enum):
    """What runs in slices."""

    LOSS_HEAD = "loss_head"
    SLICED_CALL = "sliced_call"
    SLICED_TOKENS = "sliced_tokens"


class Rewrite(Record):
    """One decision that changes the program of the step: a module that runs in slices.

    A loss head: the projection to classes and the cross entropy after it run together, slice by
    slice along the rows, and only one slice's logits are alive. A sliced call: the module runs on
    one slice of the batch after the other, each recomputed in backward. Sliced tokens: the same
    along the rows of a module that treats each of them by itself. Sums are added in another
    order, so that the loss and the gradients of the parameters in `affects` may differ in their
    last bits from those of the step without the plan; every other result is the same.
    """

    kind: RewriteKind = RewriteKind.LOSS_HEAD
    module: str = Field(description="Fully qualified name of the module that runs in slices.")
    num_slices: int = Field(ge=2, description="Slices along the rows (tokens) or the batch.")
    arguments: tuple[int, ...] = Field(
        default=(),
        description="Sliced calls: the tensors that are cut, by place among the call's leaves.",
    )
    keeps_choices: bool = Field(
        default=False, description="Sliced calls: what their ops choose is kept, as in a region."
    )
    affects: tuple[str, ...] = Field(
        default=(), description="Parameters whose gradients may differ in their last bits."
    )
    tolerance: float = Field(
        default=0.0, ge=0, description="Largest difference expected, relative to the largest value."
    )
    freed_bytes: int = Field(default=0, description="Bytes less at the keep-everything peak.")
    added_seconds: float = Field(
        default=0.0, description="Estimated time that a step takes more; negative: less."
    )
    reason: str = ""


class Severity(str, enum.Enum):
    """How bad a hazard is: gradients are wrong, memory or time is wasted, or it is good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Hazard(Record):
    """Something that could make training wrong or the prediction inexact, and what was done.

    `fix` says what to do about it, `thread` names where people met it before, as repository#number.
    """

    code: str
    where: str
    message: str
    severity: Severity = Severity.NOTE
    fix: str = ""
    thread: str = ""


class Plan(Record):
    """A decision for every module call of one training step, and what it will take.

    `predicted_peak_bytes` is the peak of one whole training step with the plan, `breakdown` its
    bytes by kind. `recompute_fraction` is the cost of the recomputed ops over that of the forward
    pass, `recompute_seconds` their estimated time including the eager overhead of the regions.
    `lower_bound_fraction` bounds what any op-level recomputation could reach, `gap` is the
    difference. `host_bytes` is what the offloaded regions hold in host memory at the end of the
    forward, when it is most. Made by `remat.plan`, applied by `remat.apply`.

    For CUDA the budget means all that the process takes on the device: `predicted_reserved_bytes`,
    `outside_bytes` and `margin_bytes`; `predicted_peak_bytes` is then what torch calls allocated,
    and `keep_all_peak_bytes` counts as the budget does.
    """

    schema_version: int = 1
    fingerprint: Fingerprint
    budget_bytes: int
    predicted_peak_bytes: int
    keep_all_peak_bytes: int
    forward_seconds: float
    step_seconds: float = Field(description="Estimated time of a step without recomputation.")
    recompute_seconds: float
    recompute_fraction: float
    lower_bound_fraction: float
    gap: float
    outcome: Outcome
    regions: tuple[Region, ...]
    rewrites: tuple[Rewrite, ...] = Field(
        default=(), description="Modules that run in slices: results differ in their last bits."
    )
    hazards: tuple[Hazard, ...] = ()
    breakdown: dict[str, int] = Field(description="Bytes at the predicted peak by kind.")
    margin_bytes: int = Field(default=0, description="Kept free for what could not be predicted.")
    device: str = Field(default="", description="Row of the device table that it was made for.")
    predicted_reserved_bytes: int | None = Field(
        default=None, description="Peak of what CUDA's caching allocator takes from the device."
    )
    outside_bytes: int = Field(
        default=0, description="Held on the device outside the allocator: the CUDA context."
    )
    cost_source: str = Field(default="", description="Where the seconds come from.")
    step_error_bar: ErrorBar | None = Field(
        default=None,
        description="Measured over predicted step time, learnt from earlier runs on the device.",
    )
    plan_seconds: float = Field(default=0.0, description="Time that planning took.")
    replaces_checkpointing: bool = Field(
        default=False,
        description="The model's own calls of torch's checkpoint run plainly while the plan is on.",
    )
    host_budget_bytes: int | None = Field(
        default=None, ge=1, description="Most bytes of host memory; none if nothing is offloaded."
    )
    notes: tuple[str, ...] = ()

    @property
    def predicted_step_seconds(self) -> float:
        """Estimated time of a step under the plan."""
        return self.step_seconds + self.recompute_seconds

    @property
    def offloads(self) -> tuple[Region, ...]:
        """The regions that keep something in host memory."""
        return tuple(region for region in self.regions if region.offload is not None)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the plan takes, predicted."""
        return sum(r.offload.host_bytes for r in self.regions if r.offload is not None)

    @property
    def transfer_seconds(self) -> float:
        """Time of copies to and from the host that no computation hides, part of the overhead."""
        return sum(r.offload.transfer_seconds for r in self.regions if r.offload is not None)

    @property
    def packed_bytes(self) -> int:
        """Bytes of results that are kept packed between forward and backward."""
        return sum(region.packed_bytes for region in self.regions)

    @property
    def packing_seconds(self) -> float:
        """Time of packing and unpacking them, part of the overhead."""
        return sum(region.packing_seconds for region in self.regions)

    def __str__(self) -> str:
        from remat.planner.describe import describe_plan

        return describe_plan(self)

    def summary(self) -> str:
        """One sentence: the peak, what is recomputed, and what it costs."""
        sliced = ""
        if self.rewrites:
            first, others = self.rewrites[0], len(self.rewrites) - 1
            named = f"{first.module} and {others} more run" if others else f"{first.module} runs"
            sliced = f"{named} in {first.num_slices} slices; "
        if not self.regions:
            return (
                f"{sliced or 'N'}{'n' if sliced else ''}othing is recomputed: the peak of "
                f"{format_bytes(self.predicted_peak_bytes)} is within the budget of "
                f"{format_bytes(self.budget_bytes)}."
            )
        count = sum(region.is_recomputed for region in self.regions)
        regions = "1 region is" if count == 1 else f"{count} regions are"
        moved = f" and {format_bytes(self.host_bytes)} wait on the host" if self.offloads else ""
        return (
            f"{sliced}{regions} recomputed{moved}: peak "
            f"{format_bytes(self.predicted_peak_bytes)} instead of "
            f"{format_bytes(self.keep_all_peak_bytes)}, for {self.recompute_fraction:.1%} of the "
            f"forward pass again ({format_seconds(self.recompute_seconds)} per step)."
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan; see `Record.load` for the errors."""
        return super().load(Path(path))
