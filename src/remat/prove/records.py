"""What was measured and verified, as data."""

from __future__ import annotations

import enum
from collections.abc import Iterator

from pydantic import Field

from remat.files import Record
from remat.planner.records import Hazard, Severity


class Measurement(Record):
    """A real run of a few training steps.

    `peak_bytes` is the peak of one whole step on the device (base included), `base_bytes` what is
    alive before the step (parameters, buffers, optimizer state, batch).
    """

    peak_bytes: int
    base_bytes: int
    step_seconds: tuple[float, ...]
    median_seconds: float
    iqr_seconds: float
    losses: tuple[float, ...]
    device: str
    source: str


class Difference(Record):
    """How far one tensor of the planned step is from that of the unplanned step."""

    name: str
    max_abs: float
    max_rel: float
    note: str = ""


class Verification(Record):
    """Whether the planned step gave the same loss, gradients, buffers and random state.

    `identical`: equal bit for bit. `within_noise`: the unplanned model itself is not reproducible,
    and the planned step differs from it no more than two unplanned steps do from each other.
    `within_rounding`: the plan runs modules in slices, and only the loss and the gradients that it
    names differ, by no more than `tolerance` allows for sums in another order.
    `passed` also asks that both peaks keep their budgets; host memory counts what offloading takes.
    """

    identical: bool
    within_noise: bool
    within_rounding: bool = False
    tolerance: float = 0.0
    passed: bool
    differences: tuple[Difference, ...]
    noise: tuple[Difference, ...] = ()
    num_compared: int
    measured_peak_bytes: int
    predicted_peak_bytes: int
    budget_bytes: int
    peak_error: float
    within_budget: bool
    measured_host_bytes: int = 0
    predicted_host_bytes: int = 0
    host_budget_bytes: int | None = None
    notes: tuple[str, ...] = ()


class MemorySample(Record):
    """Bytes alive by kind at one moment of a simulated step."""

    phase: str
    bytes_by_kind: dict[str, int]


class Act(str, enum.Enum):
    """What a step does in one moment of its story."""

    FORWARD = "forward"
    AGAIN = "again"
    BACKWARD = "backward"
    UPDATE = "update"


class StoryMoment(Record):
    """One block at work, from when it starts until another block or another act begins."""

    act: Act
    block: int = Field(description="Which block of the story, counted from 0.")
    bytes_by_kind: dict[str, int] = Field(description="Bytes alive when they are most.")
    held_bytes: tuple[int, ...] = Field(
        description="For each block, what it made in forward and still holds at the moment's end."
    )


class StepStory(Record):
    """One simulated step as a student would tell it: which block works when, and what it holds.

    The blocks are module calls of the model in forward order, the loss last; neighbours are put
    together where there are many. The highest moment is the peak of the step.
    """

    blocks: tuple[str, ...]
    moments: tuple[StoryMoment, ...]


class Simulation(Record):
    """One training step under fake tensors: its exact peak and its curve of memory.

    On CUDA `peak_bytes` is what the caching allocator hands out, and `reserved_bytes` what it
    takes from the device for that.
    `host_bytes` is what offloading would take of host memory, which is none of the peak.
    """

    peak_bytes: int
    reserved_bytes: int | None = None
    breakdown: dict[str, int]
    samples: tuple[MemorySample, ...]
    host_bytes: int = 0
    by_module: dict[str, int] = Field(
        default_factory=dict,
        description="Bytes at the peak by the module that made them; other kinds in brackets.",
    )
    story: StepStory | None = None


class CheckReport(Record):
    """What `remat.check` found; iterating over it gives the hazards.

    `num_regions` are the calls that the model's own checkpointing recomputes in a step.
    `was_compared`: the step ran for real as the model stands and with its checkpointing switched
    off; `identical` says that both left the same loss, gradients, buffers and random state, bit
    for bit or as close as the model is to itself; `differences` are those beyond that.
    `peak_bytes` is the simulated peak of a step as the model stands (`None` where that step
    fails), `plain_peak_bytes` without its checkpointing.
    """

    hazards: tuple[Hazard, ...]
    num_regions: int
    was_compared: bool
    identical: bool
    differences: tuple[Difference, ...] = ()
    peak_bytes: int | None
    plain_peak_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether nothing worse than a note was found."""
        return all(hazard.severity is Severity.NOTE for hazard in self.hazards)

    # Replaces pydantic's walk over fields, which nothing needs here: a report is its hazards.
    def __iter__(self) -> Iterator[Hazard]:  # type: ignore[override]
        return iter(self.hazards)

    def __len__(self) -> int:
        return len(self.hazards)


class GuardEvent(Record):
    """What a guard saw in a step: `drift` from the predicted peak, or a plan `tightened`."""

    kind: str
    step: int
    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    budget_bytes: int
    message: str
