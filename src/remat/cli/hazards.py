"""What `remat check` found, for the terminal: where, what happens, what to do, who met it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from remat.planner.records import Hazard, Severity
from remat.prove.records import CheckReport
from remat.units import format_bytes

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def report_view(name: str, report: CheckReport) -> RenderableType:
    """Show each hazard, what was compared, and the peaks."""
    clean = Text("clean", style="bold green")
    verdict = clean if report.is_clean else Text("hazards found", style="bold red")
    parts: list[RenderableType] = [Text.assemble((name, "bold"), " · check ", verdict), Text()]
    for hazard in report.hazards:
        parts += [*_hazard(hazard), Text()]
    parts.append(Text(_summary(report)))
    parts += [Padding(Text(f"- {remark}"), (0, 0, 0, 2)) for remark in report.notes]
    parts.append(Text())
    return Group(*parts)


def _hazard(hazard: Hazard) -> list[RenderableType]:
    head = Text.assemble(
        (hazard.severity.value, _STYLES[hazard.severity]), f" {hazard.code} at {hazard.where}"
    )
    lines: list[RenderableType] = [head]
    for label, text in (
        ("what", hazard.message),
        ("fix", hazard.fix),
        ("see", hazard.thread),
    ):
        if text:
            lines.append(Padding(Text.assemble((f"{label}: ", "dim"), text), (0, 0, 0, 2)))
    return lines


def _summary(report: CheckReport) -> str:
    """Say how much is checkpointed, what that saves, and how the comparison came out."""
    if not report.num_regions:
        return "The model checkpoints nothing."
    calls = "1 call" if report.num_regions == 1 else f"{report.num_regions} calls"
    plain = format_bytes(report.plain_peak_bytes)
    if report.peak_bytes is None:
        return f"{calls} checkpointed; the step fails as it stands (peak without: {plain})."
    text = f"{calls} checkpointed: peak {format_bytes(report.peak_bytes)} instead of {plain}."
    if not report.was_compared:
        return text
    if report.identical:
        return f"{text} Loss, gradients, buffers and random state are those of the plain model."
    return f"{text} {len(report.differences)} results differ from those of the plain model."
