"""A verdict for machines and people in CI: JUnit XML, Markdown, and annotations of GitHub."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree as ET

from remat.operate.gate.records import GateCheck, GateReport, Outcome

_WORDS = {Outcome.PASSED: "passed", Outcome.FAILED: "FAILED", Outcome.NOT_COMPARED: "not compared"}
_TITLES = {
    Outcome.FAILED: "Failed",
    Outcome.NOT_COMPARED: "Not compared",
    Outcome.PASSED: "Passed",
}


def junit_xml(report: GateReport) -> str:
    """Write the verdict as JUnit XML: a failure for each failed check, skipped if not compared."""
    counts = {
        "tests": len(report.checks),
        "failures": len(report.of(Outcome.FAILED)),
        "skipped": len(report.of(Outcome.NOT_COMPARED)),
        "errors": 0,
    }
    attributes = {name: str(count) for name, count in counts.items()}
    suites = ET.Element("testsuites", {"name": "remat gate", **attributes})
    suite = ET.SubElement(suites, "testsuite", {"name": "remat gate", **attributes})
    for check in report.checks:
        case = ET.SubElement(
            suite, "testcase", {"classname": f"remat.gate.{check.rule}", "name": _text(check.name)}
        )
        if check.outcome is Outcome.FAILED:
            failure = ET.SubElement(case, "failure", {"message": _text(check.message)})
            failure.text = _text(check.message)
        elif check.outcome is Outcome.NOT_COMPARED:
            ET.SubElement(case, "skipped", {"message": _text(check.message)})
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def gate_markdown(report: GateReport) -> str:
    """Write the verdict as Markdown for the summary of a job; what failed comes first."""
    lines = [
        f"## {report.summary}",
        "",
        f"Run `{report.run}` against baseline `{report.baseline}`.",
    ]
    for outcome, title in _TITLES.items():
        checks = report.of(outcome)
        if checks:
            lines += ["", f"### {title}", "", "| check | variant | found |", "|---|---|---|"]
            lines += [
                f"| {_cell(_rule(check))} | {_cell(check.variant)} | {_cell(check.message)} |"
                for check in checks
            ]
    return "\n".join(lines) + "\n"


def github_annotations(report: GateReport) -> Iterator[str]:
    """Yield the workflow commands of GitHub: an error for each failed check, then the verdict."""
    for check in report.of(Outcome.FAILED):
        yield f"::error title={_property(f'remat gate: {check.name}')}::{_data(check.message)}"
    for check in report.of(Outcome.NOT_COMPARED):
        title = _property(f"remat gate: {check.name}")
        yield f"::notice title={title}::not compared: {_data(check.message)}"
    kind = "notice" if report.passed else "error"
    yield f"::{kind} title=remat gate::{_data(report.summary)}"


def outcome_word(outcome: Outcome) -> str:
    """Say how a check came out, in a word or two."""
    return _WORDS[outcome]


def _rule(check: GateCheck) -> str:
    return f"{check.rule}: {check.subject}" if check.subject else check.rule


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _text(text: str) -> str:
    """Leave out what XML 1.0 has no place for, such as control characters in a name."""
    return "".join(letter for letter in text if letter >= " " or letter in "\t\n")


def _data(text: str) -> str:
    """Escape the message of a workflow command, as GitHub's own toolkit does."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """Escape a property of a workflow command, whose end a colon or comma would be."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
