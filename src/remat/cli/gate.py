"""`remat gate`: the verdict on a run for CI, and the baseline by decision."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remat.cli.groups import DEFAULT, DefaultGroup
from remat.cli.options import JsonOption
from remat.cli.runs import RootOption, RunArgument

if TYPE_CHECKING:
    from remat.operate.gate.records import GateReport

NAME = "gate"
SUMMARY = "Hold a run against its baseline by rules: the verdict for CI; promote a baseline."
EXAMPLE = "Example: remat gate 20261106-0910 --baseline 20261105-1432 --rules gate.toml"
_MOST_SHOWN = 200


def command(
    run: RunArgument,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            show_default=False,
            help="What to hold it against; the promoted run of its workload, unless given.",
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Rules, see `remat schema gate`; sensible ones, unless given.",
        ),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write the verdict as JUnit XML."),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write the verdict as Markdown."),
    ] = None,
    github: Annotated[
        bool,
        typer.Option(
            "--github",
            help="Print annotations for GitHub, and add the Markdown to the job's summary.",
        ),
    ] = False,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Hold a run against its baseline: peak, step time, quality, calibration, slices and more.

    Exit code 1 if a rule is broken, with what grew and where; 2 if the rules cannot be evaluated.
    What one of the runs lacks is not compared, and said so. `remat gate promote RUN --who --why`
    makes a run the baseline of its workload.
    """
    from remat.files import write_atomically
    from remat.operate.gate.promotion import promoted_run
    from remat.operate.gate.rules import load_rules
    from remat.operate.gate.verdict import gate
    from remat.operate.gate.writing import gate_markdown, junit_xml
    from remat.runs.store import load_run

    chosen = load_rules(rules)
    record = load_run(run, root)
    before = load_run(promoted_run(record.name, root) if baseline is None else baseline, root)
    report = gate(record, before, chosen).model_copy(update={"rules": str(rules or "")})
    if junit is not None:
        write_atomically(junit, junit_xml(report))
    if markdown is not None:
        write_atomically(markdown, gate_markdown(report))
    if github:
        _tell_github(report, as_json=as_json)
    if as_json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        _show(report)
    return 0 if report.passed else 1


def promote(
    run: RunArgument,
    who: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="Who decides it.")],
    why: Annotated[str, typer.Option(metavar="TEXT", show_default=False, help="For what reason.")],
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make a run the baseline of its workload; who, when and why are recorded for good."""
    from remat.operate.gate.promotion import promote as promote_run

    promotion = promote_run(run, who=who, why=why, root=root)
    if as_json:
        typer.echo(promotion.model_dump_json(indent=1))
    else:
        instead = f" instead of {promotion.previous}" if promotion.previous else ""
        typer.echo(f"{promotion.run} is the baseline of {promotion.workload}{instead}")
    return 0


def baselines(root: RootOption = None, as_json: JsonOption = False) -> int:
    """List the promotions of baselines, the oldest first: which run, who, when and why."""
    from remat.operate.gate.promotion import history

    found = history(root)
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in found], indent=1))
        return 0
    for one in found:
        typer.echo(f"{one.at}  {one.workload}  {one.run}  {one.who}: {one.why}")
    return 0


def make_group() -> typer.Typer:
    """Build `remat gate` with the commands inside."""
    group = typer.Typer(cls=DefaultGroup, rich_markup_mode="markdown")
    group.command(DEFAULT, hidden=True, epilog=EXAMPLE)(command)
    promoted = 'remat gate promote 20261105-1432 --who Ada --why "release 1.2"'
    group.command("promote", epilog=f"Example: {promoted}")(promote)
    group.command("baselines", epilog="Example: remat gate baselines --json")(baselines)
    return group


def _tell_github(report: GateReport, *, as_json: bool) -> None:
    """Print annotations, on stderr where stdout is for JSON, and add to the job's summary."""
    from remat.operate.gate.writing import gate_markdown, github_annotations

    for line in github_annotations(report):
        typer.echo(line, err=as_json)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as stream:
            stream.write(gate_markdown(report))


def _show(report: GateReport) -> None:
    from rich.table import Table
    from rich.text import Text

    from remat.cli.screen import out
    from remat.operate.gate.records import Outcome
    from remat.operate.gate.writing import outcome_word

    styles = {Outcome.PASSED: "green", Outcome.FAILED: "bold red", Outcome.NOT_COMPARED: "yellow"}
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for heading in ("", "rule", "variant", "found"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "")
    order = (Outcome.FAILED, Outcome.NOT_COMPARED, Outcome.PASSED)
    checks = sorted(report.checks, key=lambda check: order.index(check.outcome))
    for check in checks[:_MOST_SHOWN]:
        rule = f"{check.rule}\n{check.subject}" if check.subject else check.rule
        word = Text(outcome_word(check.outcome), style=styles[check.outcome])
        table.add_row(word, Text(rule), Text(check.variant), Text(check.message))
    console = out()
    console.print(Text.assemble((report.run, "bold"), " against ", (report.baseline, "bold")))
    console.print(table)
    if len(checks) > _MOST_SHOWN:
        console.print(f"and {len(checks) - _MOST_SHOWN} more; --json lists all")
    style = "bold green" if report.passed else "bold red"
    console.print(Text(report.summary, style=style))
