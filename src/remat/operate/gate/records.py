"""The rules of a gate (`gate.toml`), its verdict, and the promotions of baselines, as data."""

from __future__ import annotations

import enum

from pydantic import Field

from remat.files import Record


class PeakRule(Record):
    """Measured peak of a training step. Exact on a CPU, so that small growth counts."""

    enabled: bool = True
    max_growth: float | None = Field(
        default=0.01, ge=0, description="Relative to the baseline: 0.01 allows 1% more."
    )
    max: str | None = Field(default=None, description="Absolute limit, such as 8GiB.")


class StepTimeRule(Record):
    """Seconds per step. Growth counts where it is beyond the measured noise of both runs."""

    enabled: bool = True
    max_growth: float | None = Field(
        default=0.10, ge=0, description="Relative to the baseline, beyond the noise."
    )
    max_seconds: float | None = Field(default=None, gt=0, description="Absolute limit.")


class QualityRule(Record):
    """A validation metric at the end of training."""

    enabled: bool = True
    metric: str | None = Field(
        default=None,
        description="Which one; by default the one that stands for the run, such as accuracy.",
    )
    max_drop: float | None = Field(
        default=0.01, ge=0, description="Of a share such as accuracy or R2: points of one."
    )
    max_growth: float | None = Field(
        default=0.02, ge=0, description="Of a loss, an error or perplexity: relative."
    )
    min: float | None = Field(default=None, description="Absolute limit from below.")
    max: float | None = Field(default=None, description="Absolute limit from above.")


class CalibrationRule(Record):
    """Expected calibration error on the evaluation data, as trained."""

    enabled: bool = True
    max_growth: float | None = Field(default=0.02, ge=0, description="In points of one.")
    max: float | None = Field(default=None, ge=0, description="Absolute limit.")


class SliceRule(Record):
    """The quality of every slice that both runs measured."""

    enabled: bool = True
    max_drop: float | None = Field(
        default=0.02, ge=0, description="Of a share: points of one; of anything else: relative."
    )
    min: float | None = Field(default=None, description="Absolute limit from below, for shares.")


class LatencyRule(Record):
    """Time to answer one batch, by form over its batch sizes; medians must have grown, too."""

    enabled: bool = True
    max_growth: float | None = Field(
        default=0.30, ge=0, description="Of the 95th percentiles, relative to the baseline."
    )
    max_p95_seconds: float | None = Field(default=None, gt=0, description="Absolute limit.")


class PredictionRule(Record):
    """How far the measured peak is from the predicted one, beyond the plan's own margin."""

    enabled: bool = True
    max: float | None = Field(
        default=None, ge=0, description="Relative; 0.01 on a CPU and 0.02 elsewhere, unless given."
    )


class ParityRule(Record):
    """Gradients, losses and weights as without the plan, as far as the plan promises it."""

    enabled: bool = True


class Gate(Record):
    """What a run must keep; a rule that is left out of the file stands as it does by default."""

    schema_version: int = 1
    variants: tuple[str, ...] = Field(
        default=(), description="Labels of the variants that count; all that both runs have."
    )
    peak: PeakRule = PeakRule()
    step_time: StepTimeRule = StepTimeRule()
    quality: QualityRule = QualityRule()
    calibration: CalibrationRule = CalibrationRule()
    slice: SliceRule = SliceRule()
    latency: LatencyRule = LatencyRule()
    prediction_error: PredictionRule = PredictionRule()
    gradient_parity: ParityRule = ParityRule()


class Outcome(str, enum.Enum):
    """How one check came out. What could not be compared has not passed."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_COMPARED = "not_compared"

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return {
            Outcome.PASSED: "The run keeps the rule.",
            Outcome.FAILED: "The run breaks the rule.",
            Outcome.NOT_COMPARED: "One of the runs lacks what the rule looks at.",
        }[self]


class GateCheck(Record):
    """One rule on one variant: what was found, what was allowed, and why."""

    rule: str
    variant: str = ""
    subject: str = Field(default="", description="Which metric, slice or form it is about.")
    outcome: Outcome
    baseline: float | None = None
    found: float | None = None
    allowed: float | None = Field(
        default=None, description="The limit, with the tolerance and the measured noise in it."
    )
    noise: float | None = Field(default=None, description="What chance alone may show.")
    message: str

    @property
    def name(self) -> str:
        """Name of the check: rule, variant and subject."""
        return " / ".join(part for part in (self.rule, self.variant, self.subject) if part)


class GateReport(Record):
    """The verdict on one run: passed if no check failed and at least one was made."""

    schema_version: int = 1
    run: str
    baseline: str
    rules: str = Field(description="File of the rules; empty for the default ones.")
    passed: bool
    checks: tuple[GateCheck, ...]

    def of(self, outcome: Outcome) -> tuple[GateCheck, ...]:
        """Return the checks that came out so."""
        return tuple(check for check in self.checks if check.outcome is outcome)

    @property
    def summary(self) -> str:
        """One sentence: how many checks passed, failed, and could not be made."""
        passed, failed, missing = (len(self.of(outcome)) for outcome in Outcome)
        word = "passed" if self.passed else "FAILED"
        text = f"gate {word}: {passed} checks passed, {failed} failed"
        return f"{text}, {missing} not compared" if missing else text


class Promotion(Record):
    """A baseline by decision: which run, of which bytes, since when, by whom, and why."""

    schema_version: int = 1
    at: str
    who: str
    why: str
    workload: str
    run: str
    run_sha256: str
    previous: str | None = None
