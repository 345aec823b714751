"""What counts against a budget on a device: requested bytes on the CPU, reserved ones on CUDA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from remat.cost.allocator_rules import AllocatorOptions
from remat.cost.devices import Device
from remat.prove.caching import CachingAllocator
from remat.prove.records import Simulation
from remat.prove.reserved import AllocatorPeaks, Event, replay
from remat.prove.simulate import summarize
from remat.trace.records import OpSignature, StepTrace
from remat.trace.target import Target

# Kept free, relative to the peak, where kernels' own workspace could not be measured: convolutions
# choose among algorithms by the workspace that they find, the other kernels take little.
UNKNOWN_WORKSPACE_MARGIN = 0.05
SMALL_WORKSPACE_MARGIN = 0.01
# What the allocator adds to what is requested: rounding, and the libraries' workspaces.
ALLOCATOR = "allocator"
# What is reserved beyond that, and what the device holds outside the allocator.
FRAGMENTS, CONTEXT = "unused segments", "context"


def target_of(device: Device, model_device_type: str) -> Target | None:
    """Return what a step must be traced for; `None` where the model is on such a device already."""
    if device.torch_type == "cpu" or model_device_type != "cpu":
        return None
    return Target(
        device_type=device.torch_type,
        compute_capability=device.capability,
        is_rocm=device.kind == "rocm",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """How the bytes of a simulated step are counted against a budget.

    On CUDA and ROCm the step is replayed through the caching allocator; its segments count, and
    what the context takes beside them. Elsewhere what the step requests counts.
    """

    device: Device
    device_type: str
    is_workspace_known: bool
    has_convolutions: bool

    @property
    def options(self) -> AllocatorOptions:
        """Return the settings that the allocator is replayed under."""
        return self.device.allocator_options

    @property
    def counts_reserved(self) -> bool:
        """Whether the budget means what the caching allocator reserves."""
        return self.device_type == "cuda"

    @property
    def outside_bytes(self) -> int:
        """Return what the device holds outside the allocator: its context."""
        return self.device.context_bytes if self.counts_reserved else 0

    @property
    def library_bytes(self) -> int:
        """Return what cuBLAS takes from the allocator for each of two threads."""
        return self.device.workspace_bytes if self.counts_reserved else 0

    def simulation(
        self, trace: StepTrace, workspace: Mapping[OpSignature, int], host_bytes: int = 0
    ) -> Simulation:
        """Reduce a trace made without `drop_saved` to its peaks and a sampled memory curve."""
        found = summarize(trace, workspace, host_bytes)
        if not self.counts_reserved:
            return found
        peaks = self.peaks(trace, workspace)
        added = peaks.allocated_bytes - found.peak_bytes
        return found.model_copy(
            update={
                "peak_bytes": peaks.allocated_bytes,
                "reserved_bytes": peaks.reserved_bytes,
                "breakdown": {**found.breakdown, ALLOCATOR: added},
            }
        )

    def peaks(
        self,
        trace: StepTrace,
        workspace: Mapping[OpSignature, int] | None = None,
        events: Sequence[Event] | None = None,
    ) -> AllocatorPeaks:
        """Replay the step through the device's allocator; `events` are the trace's unless given.

        A step that its limit refuses is replayed without one: then it says how much is missing.
        """

        def under(options: AllocatorOptions) -> AllocatorPeaks:
            return replay(
                trace, CachingAllocator(options), workspace=workspace, events=events,
                library_bytes=self.library_bytes,
            )  # fmt: skip

        found = under(self.options)
        return found if found.fits else under(dataclasses.replace(self.options, limit_bytes=None))

    def needed_bytes(self, simulation: Simulation) -> int:
        """Return the least budget that a simulated plan fits, context and margin included."""
        return self.needed_for(simulation.reserved_bytes or simulation.peak_bytes)

    def needed_for(self, held_bytes: int) -> int:
        """Return the least budget of a step that holds so much by itself."""
        return held_bytes + self.outside_bytes + self.margin_bytes(held_bytes)

    def blame(self, simulation: Simulation) -> dict[str, int]:
        """Return what fills the device by kind, with what is held outside the step."""
        if not self.counts_reserved:
            return simulation.breakdown
        held = simulation.reserved_bytes or simulation.peak_bytes
        return simulation.breakdown | {
            FRAGMENTS: held - simulation.peak_bytes,
            CONTEXT: self.outside_bytes,
        }

    def allowed_bytes(self, budget_bytes: int) -> int:
        """Return the most that a step may hold by itself under a budget."""
        inside = max(0, budget_bytes - self.outside_bytes)
        # The margin grows with the peak: the largest peak that fits with its own margin.
        return int(inside / (1 + self._margin_share))

    def margin_bytes(self, held_bytes: int) -> int:
        """Return what is kept free above what a step holds."""
        return int(held_bytes * self._margin_share)

    @property
    def _margin_share(self) -> float:
        if self.is_workspace_known:
            return 0.0
        if self.counts_reserved and not self.has_convolutions:
            return SMALL_WORKSPACE_MARGIN
        return UNKNOWN_WORKSPACE_MARGIN

    def notes(self) -> tuple[str, ...]:
        """Say what the margin is kept for, and which settings of the allocator are counted on."""
        notes = [] if self.is_workspace_known else [self._margin_note()]
        if self.counts_reserved and self.device.alloc_conf:
            notes.append(
                "Reserved memory is that of the allocator under "
                f"PYTORCH_ALLOC_CONF={self.device.alloc_conf}: train with the same."
            )
        return tuple(notes)

    def _margin_note(self) -> str:
        return (
            "Kernels' own workspace could not be measured on this device: "
            f"{self._margin_share:.0%} of the peak is kept free for it."
        )
