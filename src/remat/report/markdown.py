"""The report of a run as Markdown, for a pull request or a ticket: the page's words and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from remat.report import view
from remat.report.document import report_sections
from remat.report.sentences import five_sentences
from remat.report.tables import Section, Table
from remat.runs.records import Run


def render_markdown(run: Run) -> str:
    """Write the five sentences, every table with how it was measured, and every gap."""
    lines = [f"# {cell(run.name)}", "", "## Summary", ""]
    lines += [f"- **{s.question}** {plain(s.text)}" for s in five_sentences(run)]
    lines += ["", "## Evidence", "", plain(run.summary), ""]
    for section in report_sections(run):
        lines += [*_section(section), ""]
    lines += ["### How this was measured", ""]
    lines += [f"- {term}: {plain(text)}" for term, text in view.how_measured(run)]
    return "\n".join(lines) + "\n"


def markdown_table(table: Table) -> Iterator[str]:
    """Write a table, figures to the right."""
    yield _line(table.columns)
    yield _line(["---" if i in table.words else "---:" for i in range(len(table.columns))])
    yield from (_line(row) for row in table.rows)


def plain(text: str) -> str:
    """Keep a text from being read as markup: a tag, an emphasis or a link."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for character in "\\`*_[]":
        text = text.replace(character, f"\\{character}")
    return text


def cell(text: str) -> str:
    """Keep a text inside its cell: a bar or a line break would end it."""
    return plain(text).replace("|", "\\|")


def _section(section: Section) -> Iterator[str]:
    yield f"### {cell(section.title)}"
    for gap in section.gaps:
        yield from ("", f"> **Not evaluated** {plain(gap)}")
    for remark in section.remarks:
        yield from ("", plain(remark))
    for table in section.tables:
        if len(section.tables) > 1:
            yield from ("", f"**{cell(table.title)}**")
        yield ""
        yield from markdown_table(table)
    for line in section.working:
        yield from ("", f"Arithmetic: {plain(line)}")
    if section.how and section.tables:
        yield from ("", f"How measured: {plain(section.how)}")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell(text) for text in cells) + " |"
