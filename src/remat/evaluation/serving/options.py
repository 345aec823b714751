"""What a serving measurement may take, and the latency that is aimed at."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from remat.errors import WorkloadError

_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_FORM = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(us|µs|ms|s)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How long serving is measured, at which batch sizes, and for which latency.

    Arguments
    ---------
    target_p95_seconds: 95 of 100 requests are to be answered within it.
    seconds: time for the timed requests of all forms and batch sizes together.
    update_seconds: time for update steps beside requests.
    batch_sizes: requests of these many examples are timed.
    exports: whether exported and quantized forms are made.
    max_examples, quality_seconds: most validation examples on which each form is measured, and
        time for all forms; all are measured on the same ones.
    """

    target_p95_seconds: float | None = None
    seconds: float = 2.0
    update_seconds: float = 0.6
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    exports: bool = True
    max_examples: int = 4096
    quality_seconds: float = 3.0

    def __post_init__(self) -> None:
        figures = {"seconds": self.seconds, "update_seconds": self.update_seconds}
        if self.target_p95_seconds is not None:
            figures["target_p95_seconds"] = self.target_p95_seconds
        for label, value in figures.items():
            if not (math.isfinite(value) and value > 0):
                raise WorkloadError(f"{label} must be a number of seconds above 0, got {value!r}.")
        if not self.batch_sizes or any(
            isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.batch_sizes
        ):
            raise WorkloadError(
                f"batch_sizes must be integers >= 1, at least one, got {self.batch_sizes!r}."
            )


def parse_latency(text: str) -> float:
    """Read a latency such as `20ms` as seconds.

    >>> parse_latency("20ms"), parse_latency("1.5 s")
    (0.02, 1.5)

    Raises
    ------
    WorkloadError: if it is not a number above 0 with a unit.
    """
    found = _FORM.fullmatch(text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise WorkloadError(
            f"latency {text!r} cannot be read: expected a number above 0 and a unit (us, ms, s), "
            "such as 20ms."
        )
    return seconds
