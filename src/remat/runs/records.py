"""A run as data: what was trained under which plan, what it took, and what it changed."""

from __future__ import annotations

import enum
from typing import Any

from pydantic import Field

from remat.files import Record
from remat.planner.records import Plan
from remat.prove.records import MemorySample, StepStory, Verification
from remat.runs.evidence import (
    CalibrationEvidence,
    Coverage,
    Equivalence,
    Expense,
    Gap,
    PriceSource,
    Repeat,
    Representation,
    Serving,
    SliceQuality,
)


class VariantKind(str, enum.Enum):
    """Where a variant comes from; pictures mark the kinds apart."""

    REFERENCE = "reference"
    POLICY = "policy"
    PLANNED = "planned"


class VariantStatus(str, enum.Enum):
    """How far a variant came."""

    PENDING = "pending"
    MEASURED = "measured"
    FINISHED = "finished"
    INFEASIBLE = "infeasible"
    FAILED = "failed"

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return {
            VariantStatus.PENDING: "The run ended before this variant was finished.",
            VariantStatus.MEASURED: "Measured and timed, but not trained.",
            VariantStatus.FINISHED: "Planned, verified, timed and trained.",
            VariantStatus.INFEASIBLE: "No plan that was found stays within this budget.",
            VariantStatus.FAILED: "The variant could not be run; the message says why.",
        }[self]


class Verdict(str, enum.Enum):
    """What the variant's checks say."""

    REFERENCE = "reference"
    PASSED = "passed"
    FAILED = "failed"
    NONE = "none"


class StepTimes(Record):
    """Seconds per training step, measured in turn with the other variants of the run."""

    seconds: tuple[float, ...]
    median_seconds: float
    iqr_seconds: float
    warmup_rounds: int = Field(ge=0, description="Rounds that ran before and were not counted.")


class EpochQuality(Record):
    """Validation metrics at the end of one epoch; the loss is always among them."""

    epoch: int
    num_examples: int
    metrics: dict[str, float]
    train_seconds: float | None = Field(
        default=None, description="Time in training from its start to the end of this epoch."
    )


class Variant(Record):
    """One way to train the workload: without a plan, under a fixed policy, or under a plan."""

    label: str
    kind: VariantKind
    status: VariantStatus = VariantStatus.PENDING
    verdict: Verdict = Verdict.NONE
    message: str = Field(default="", description="Why the verdict or the status is what it is.")
    asked_budget: str | None = Field(default=None, description="As it was asked for, such as 60%.")
    budget_bytes: int | None = None
    minimum_bytes: int | None = Field(
        default=None, description="Least peak that a plan was found for, where the budget is below."
    )
    plan: Plan | None = None
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    verification: Verification | None = None
    step_times: StepTimes | None = None
    timeline: tuple[MemorySample, ...] = Field(
        default=(), description="Memory over one simulated step, thinned out; peaks are kept."
    )
    story: StepStory | None = Field(
        default=None, description="The same step block by block: what runs, what it holds."
    )
    losses: tuple[float, ...] = Field(default=(), description="Training loss of every step.")
    quality: tuple[EpochQuality, ...] = ()
    train_seconds: float | None = None
    seconds_to_target: float | None = Field(
        default=None,
        description="Time in training until every target of the run was first seen to be reached; "
        "None where they never were, or none was asked for.",
    )
    steps_to_target: int | None = Field(default=None, description="The same in steps.")
    losses_identical: bool | None = Field(
        default=None, description="Every loss equals that of the run without a plan, bit for bit."
    )
    weights_identical: bool | None = Field(
        default=None, description="The final weights and buffers equal, bit for bit."
    )
    weights_sha256: str | None = None
    peak_by_module: dict[str, int] = Field(
        default_factory=dict,
        description="Bytes at the simulated peak by the module that made them; "
        "kinds that no module makes in brackets.",
    )
    repeats: tuple[Repeat, ...] = Field(
        default=(), description="The same training from further seeds."
    )
    calibration: CalibrationEvidence | None = None
    coverage: tuple[Coverage, ...] = ()
    slices: tuple[SliceQuality, ...] = ()


class FrontPoint(Record):
    """One point of the planned Pareto front; predicted, not run."""

    peak_bytes: int
    step_seconds: float
    recompute_fraction: float


class Environment(Record):
    """Where and how the run was made."""

    command: str
    machine: str
    processor: str
    num_threads: int
    memory_bytes: int | None
    device: str
    python: str
    versions: dict[str, str]
    git_commit: str | None
    git_dirty: bool | None


class Settings(Record):
    """What an evaluation was asked for; going on with it asks for the same."""

    budgets: tuple[int | str, ...] = Field(description="As they were asked for.")
    policies: tuple[str, ...]
    peers: tuple[str, ...]
    front_points: int
    max_steps: int | None
    timing_rounds: int
    warmup_rounds: int
    keeps_weights: bool = False
    seeds: int = 1
    margin: float | None = None
    # Any: the options of serving and prices, as their own classes have them
    serving: dict[str, Any] | None = None
    expenses: dict[str, Any] | None = None
    check_every: int | None = Field(
        default=None, description="Steps between two looks at whether the targets are reached."
    )
    device: str | None = Field(
        default=None,
        description="Where to train, as torch names it; else where the model is built.",
    )


class Origin(Record):
    """What training starts from, by its bytes: the same start gives the same losses."""

    weights_sha256: str
    batch_sha256: str = Field(description="Of the first batch of training.")


class Artifact(Record):
    """A file that belongs to a run, kept by its content: `objects/<sha256>` of the store."""

    name: str
    sha256: str
    size_bytes: int
    media_type: str


class RunStatus(str, enum.Enum):
    """Whether the run came to its end."""

    COMPLETE = "complete"
    UNFINISHED = "unfinished"


class Run(Record):
    """One evaluation: the same training under several plans, on one machine.

    `passed` is true where every planned variant passed its checks. A run that was interrupted
    holds the variants that were finished, and says so in `status`.
    """

    schema_version: int = 1
    id: str
    name: str
    created: str = Field(description="Start of the run, UTC, ISO 8601.")
    status: RunStatus
    seed: int
    epochs: int
    batch_size: int
    batch_signature: tuple[str, ...] = Field(description="Shape and dtype of each batch entry.")
    num_parameters: int
    environment: Environment
    variants: tuple[Variant, ...]
    front: tuple[FrontPoint, ...] = ()
    targets: dict[str, float] = Field(
        default_factory=dict, description="Metrics that training should reach."
    )
    equivalences: tuple[Equivalence, ...] = ()
    representation: tuple[Representation, ...] = ()
    serving: Serving | None = None
    expenses: tuple[Expense, ...] = ()
    price_sources: tuple[PriceSource, ...] = Field(
        default=(), description="Where every figure that the expenses follow from is from."
    )
    gaps: tuple[Gap, ...] = Field(
        default=(), description="What could not be evaluated, each with its reason."
    )
    passed: bool
    summary: str
    notes: tuple[str, ...] = ()
    settings: Settings | None = None
    origin: Origin | None = None
    finished_stages: tuple[str, ...] = Field(
        default=(), description="Stages that came to their end; a resumed run skips them."
    )
    yardstick: StepTimes | None = Field(
        default=None,
        description="A fixed piece of work, timed in turn with the steps.",
    )
    artifacts: tuple[Artifact, ...] = ()
