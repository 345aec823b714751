"""What a serving measurement has found so far, and what it could not find."""

from __future__ import annotations

from dataclasses import dataclass, field

from remat.errors import RematError
from remat.runs.evidence import Gap, Latency, ServedForm

SECTION = "serving"


@dataclass(slots=True)
class Found:
    """Forms, latencies and gaps of one model, as they come."""

    forms: list[ServedForm] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    def skip(self, what: str, error: Exception | str) -> None:
        """Note what could not be measured, and why."""
        why = error if isinstance(error, str) else first_line(error)
        self.gaps.append(Gap(section=SECTION, reason=f"{what}: {why}"))


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, with its type where it is not ours."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, RematError) and lines[0]:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
