"""Many runs on one page: a row each with its curve and its front, and the decisions below."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remat.errors import RunError
from remat.files import write_atomically
from remat.report import palette, view
from remat.report.document import report_data
from remat.report.markdown import cell, markdown_table, plain
from remat.report.pages import content_policy, page_environment
from remat.report.sentences import Sentence, five_sentences, smallest_passed
from remat.report.spark import front_points, loss_path
from remat.report.tables import NOTHING, Table, table
from remat.runs.reading import final_quality, format_value, metric_name, reference_of, relative_time
from remat.runs.records import Run, RunStatus
from remat.units import format_bytes

# Any: JSON.

MOST_RUNS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One row of the comparison, with what is told of the run below."""

    run: Run
    number: int
    verdict: str
    verdict_code: str
    before: str
    after: str
    saved: str
    extra_time: str
    quality: str
    metric: str
    plan: str
    loss: str
    front: tuple[tuple[float, float, str], ...]
    sentences: tuple[Sentence, ...]
    rows: tuple[view.Row, ...]


def write_comparison(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """Write the page that compares the runs; the errors are those of `render_comparison`."""
    return write_atomically(path, render_comparison(runs))


def render_comparison(runs: Sequence[Run]) -> str:
    """Make one page of up to 50 runs: no script, nothing loaded, every run linked within the page.

    Raises
    ------
    RunError: for more runs than a page can hold.
    """
    compared = compare(runs)
    return (
        page_environment()
        .get_template("comparison.html.j2")
        .render(
            compared=compared,
            notes=notes(runs),
            policy=content_policy(),
            light=palette.css_variables(palette.LIGHT),
            dark=palette.css_variables(palette.DARK),
        )
    )


def comparison_markdown(runs: Sequence[Run]) -> str:
    """Write the comparison as Markdown: the table, and five sentences for each run.

    Raises
    ------
    RunError: for more runs than a page can hold.
    """
    lines = [f"# {len(runs)} runs compared", ""]
    for made in comparison_tables(runs):
        lines += [*markdown_table(made), ""]
    lines += [f"- {plain(note)}" for note in notes(runs)]
    for one in compare(runs):
        lines += ["", f"## {one.number}. {cell(one.run.name)} ({one.run.id})", ""]
        lines += [f"- **{s.question}** {plain(s.text)}" for s in one.sentences]
    return "\n".join(lines) + "\n"


def comparison_data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Give the report of each run as JSON-able data, in the order of the page."""
    return [report_data(run) for run in runs]


def compare(runs: Sequence[Run]) -> tuple[ComparedRun, ...]:
    """Read each run against its own step without a plan.

    Raises
    ------
    RunError: for more runs than a page can hold.
    """
    if len(runs) > MOST_RUNS:
        raise RunError(f"a page compares at most {MOST_RUNS} runs, got {len(runs)}. Name fewer.")
    return tuple(_compared(run, number) for number, run in enumerate(runs, start=1))


def comparison_tables(runs: Sequence[Run]) -> tuple[Table, ...]:
    """Give the comparison as a table of texts."""
    columns = (
        "Run", "Id", "Without a plan", "With a plan", "Memory", "Step time", "Quality", "Verdict",
    )  # fmt: skip
    rows = (
        (
            f"{one.number}. {one.run.name}",
            one.run.id,
            one.before,
            one.after,
            one.saved,
            one.extra_time,
            f"{one.quality} {one.metric}".strip(),
            one.verdict,
        )
        for one in compare(runs)
    )
    return table("Runs", columns, rows, words=(0, 1, 7))


def notes(runs: Sequence[Run]) -> list[str]:
    """Say what keeps the runs from being compared as they stand."""
    found = []
    machines = {(r.environment.processor, r.environment.num_threads) for r in runs}
    if len(machines) > 1:
        found.append(
            f"These runs were made on {len(machines)} machines or numbers of threads: compare "
            "their changes against no plan, never their seconds."
        )
    if len({r.environment.device for r in runs}) > 1:
        found.append("They were made on several kinds of device, whose peaks count differently.")
    versions = {r.environment.versions.get("torch") for r in runs}
    if len(versions) > 1:
        listed = ", ".join(sorted(version or "unknown" for version in versions))
        found.append(f"They were made with several versions of torch: {listed}.")
    named = [run.name for run in runs]
    for name, group in itertools.groupby(sorted(named)):
        seeds = {run.seed for run in runs if run.name == name}
        if len(list(group)) > 1 and len(seeds) > 1:
            found.append(f"{name} was run from {len(seeds)} seeds.")
    return found


def _compared(run: Run, number: int) -> ComparedRun:
    reference, best = reference_of(run.variants), smallest_passed(run)
    before = reference.measured_peak_bytes if reference else None
    after = best.measured_peak_bytes if best else None
    ratio = relative_time(best, reference) if best else None
    shown = best or reference
    quality = final_quality(shown) if shown else None
    verdict, code = _verdict(run)
    return ComparedRun(
        run=run,
        number=number,
        verdict=verdict,
        verdict_code=code,
        before=NOTHING if before is None else format_bytes(before),
        after=NOTHING if after is None else format_bytes(after),
        saved=NOTHING if not (before and after) else view.signed_percent(after / before - 1),
        extra_time=NOTHING if ratio is None else view.signed_percent(ratio),
        quality=NOTHING if quality is None else format_value(*quality),
        metric="" if quality is None else metric_name(quality[0]),
        plan="" if best is None else best.label,
        loss=loss_path(shown.losses) if shown else "",
        front=front_points(run),
        sentences=five_sentences(run),
        rows=tuple(view.rows(run)),
    )


def _verdict(run: Run) -> tuple[str, str]:
    if run.passed:
        return "passed", "passed"
    if run.status is RunStatus.UNFINISHED:
        return "unfinished", "none"
    failed = any(row.verdict_code == "failed" for row in view.rows(run))
    return ("FAILED", "failed") if failed else ("no plan", "none")
