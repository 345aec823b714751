"""What an evaluation found beside memory and time: statistics, calibration, slices, serving."""

from __future__ import annotations

import enum

from pydantic import Field

from remat.files import Record


class Interval(Record):
    """A figure with its confidence interval."""

    value: float
    low: float
    high: float
    level: float = Field(default=0.95, description="Confidence level, between 0 and 1.")
    method: str = Field(description="How the interval was made, such as Wilson or Student t.")


class Gap(Record):
    """Something that could not be evaluated, and why; pages show it instead of a figure."""

    section: str
    variant: str | None = None
    reason: str


class Repeat(Record):
    """The same training again from another seed."""

    seed: int
    train_seconds: float
    losses_identical: bool | None = None
    weights_identical: bool | None = None
    metrics: dict[str, float] = Field(description="Validation metrics at the end of training.")
    steps_to_target: int | None = None
    seconds_to_target: float | None = None
    losses_sha256: str | None = Field(default=None, description="Digest of the loss curve's bits.")
    weights_sha256: str | None = None


class Equivalence(Record):
    """Whether a variant is as good as the model without a plan, by one metric over the seeds.

    Two one-sided t-tests (Schuirmann 1987) on the paired differences, against a stated margin.
    """

    variant: str
    metric: str
    num_pairs: int
    num_identical: int = Field(description="Pairs whose weights are equal bit for bit.")
    difference: Interval | None = Field(
        description="Variant minus reference, mean of the pairs; None with fewer than two pairs."
    )
    margin: float
    margin_reason: str
    p_value: float | None = Field(description="The larger one of the two tests.")
    is_equivalent: bool


class ReliabilityBin(Record):
    """Predictions of like confidence, and how often they were right."""

    low: float
    high: float
    num_examples: int
    confidence: float | None = Field(description="Mean confidence; None in an empty bin.")
    accuracy: float | None


class Calibration(Record):
    """How far confidence is from accuracy, over bins of equal width (Guo et al. 2017)."""

    num_examples: int
    expected_error: float
    maximum_error: float
    brier: float
    nll: float
    bins: tuple[ReliabilityBin, ...]


class CalibrationEvidence(Record):
    """Calibration as trained, and after one temperature fitted on held-out data.

    Where a temperature was fitted, both are on the half of the data that it was not fitted on.
    """

    before: Calibration
    after: Calibration | None = None
    temperature: float | None = None
    num_fitted: int = 0


class Coverage(Record):
    """How often an interval around a predicted value holds the truth."""

    nominal: float
    covered: Interval
    mean_width: float


class SliceOrigin(str, enum.Enum):
    """Who named the slice."""

    NAMED = "named"
    FOUND = "found"


class SliceQuality(Record):
    """One metric on one part of the evaluation data, against the rest of it."""

    name: str
    origin: SliceOrigin
    metric: str
    num_examples: int
    quality: Interval | None = Field(description="None where the slice is empty.")
    rest: float | None = Field(description="The metric on all other examples.")
    p_value: float | None = None
    adjusted_p_value: float | None = Field(
        default=None, description="After Holm's correction over all slices of the variant."
    )
    is_worse: bool = Field(description="Worse than the rest at 5% after correction.")


class Representation(Record):
    """The share of one group in the evaluation data against that in the reference."""

    feature: str
    group: str
    reference_share: float
    evaluated_share: float
    num_evaluated: int
    adjusted_p_value: float | None = None
    is_missing: bool = False
    is_off: bool = False


class Latency(Record):
    """Time to answer one batch, warm, over repeated requests."""

    form: str = Field(description="Which form of the model, by the name in `Serving.forms`.")
    batch_size: int
    num_requests: int
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float
    examples_per_second: float


class ServedForm(Record):
    """One form of the model to serve: as trained, under its plan, quantized or exported."""

    name: str
    is_available: bool = True
    message: str = Field(default="", description="Why it is not available, or what to know.")
    size_bytes: int | None = None
    first_request_seconds: float | None = Field(
        default=None, description="To make the form from what is on disk, and answer one example."
    )
    peak_bytes: int | None = Field(
        default=None, description="Most bytes alive while it answers, by torch's own record."
    )
    resident_bytes: int | None = Field(
        default=None,
        description="Growth of the resident memory of a process of its own that opens the form "
        "and answers, where another runtime than torch serves.",
    )
    metrics: dict[str, float] = Field(default_factory=dict)
    slices: tuple[SliceQuality, ...] = ()
    num_ops: int | None = Field(
        default=None, description="Ops that one request dispatches in torch, counted."
    )
    relative_latency: Interval | None = Field(
        default=None, description="Over the model as trained, measured in turn: median of pairs."
    )
    largest_difference: float | None = Field(
        default=None, description="Largest difference of any output from the model as trained."
    )


class UpdateStep(Record):
    """One training step beside serving: what recomputation adds, and how requests wait for it."""

    variant: str
    step_seconds: float
    requests_p50_seconds: float
    requests_p99_seconds: float
    steps_per_minute: float
    num_steps: int | None = None
    num_requests: int | None = None
    lag_seconds: float | None = Field(
        default=None, description="Start of a step until its weights serve: the longest measured."
    )


class Serving(Record):
    """How the trained model serves: forms, latencies, and which batch to take."""

    variant: str
    forms: tuple[ServedForm, ...]
    latencies: tuple[Latency, ...]
    target_p95_seconds: float | None = None
    recommended_batch_size: int | None = None
    recommended_form: str | None = None
    recommendation: str = ""
    updates: tuple[UpdateStep, ...] = ()


class PriceSource(Record):
    """One figure of the price tables that expenses follow from, and where it is from."""

    name: str = Field(description="What it is the price, power or rate of.")
    value: float
    unit: str
    source: str
    date: str
    is_verified: bool = Field(description="Found in its source again; else as remembered of it.")


class Expense(Record):
    """What one variant takes on one device: time, money, energy, carbon dioxide."""

    variant: str
    device: str
    offer: str = Field(description="Whose price and on which terms: cloud, spot, owned, edge.")
    fits: bool
    is_measured: bool = Field(description="Seconds were measured here; else by the cost model.")
    step_seconds: float | None = None
    epoch_seconds: float | None = None
    run_seconds: float | None = None
    target_seconds: float | None = Field(default=None, description="To the target quality.")
    usd_per_hour: float | None = None
    epoch_usd: float | None = None
    run_usd: float | None = None
    target_usd: float | None = None
    price_source: str = ""
    price_date: str = ""
    is_price_verified: bool = Field(
        default=True, description="Every price in `run_usd` was found in its source again."
    )
    storage_usd: float | None = Field(
        default=None, description="To keep what was trained for a month; part of `run_usd`."
    )
    transfer_usd: float | None = Field(
        default=None, description="To bring it out of the cloud once; part of `run_usd`."
    )
    kilowatt_hours: float | None = None
    kilograms_co2: float | None = None
    is_energy_measured: bool = False
    energy_source: str = ""
    is_energy_verified: bool = Field(
        default=True, description="Power and CO2 per kilowatt hour were found in their sources."
    )
    needed_bytes: int | None = Field(default=None, description="Of the device's memory.")
    available_bytes: int | None = None
    is_cheapest: bool = Field(
        default=False, description="The lowest price of a run among the devices that it fits."
    )
    arithmetic: str = Field(default="", description="How the figures follow, for people.")
