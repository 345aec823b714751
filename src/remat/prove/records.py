"""What was measured and verified, as data."""

from __future__ import annotations

from remat.files import Record


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
    `passed` also asks that both peaks keep their budgets; host memory counts what offloading takes.
    """

    identical: bool
    within_noise: bool
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


class Simulation(Record):
    """One training step under fake tensors: its exact peak and its curve of memory.

    `host_bytes` is what offloading would take of host memory, which is none of the peak.
    """

    peak_bytes: int
    breakdown: dict[str, int]
    samples: tuple[MemorySample, ...]
    host_bytes: int = 0
