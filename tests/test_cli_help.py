"""The help of each command is part of the interface: a snapshot shows when it changes.

After a change on purpose: `REMAT_UPDATE_SNAPSHOTS=1 python -m pytest tests/test_cli_help.py`.
"""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

from remat.cli.schema import SCHEMAS

SNAPSHOTS = Path(__file__).parent / "snapshots"
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
COMMANDS = (
    "", "plan", "fit", "calibrate", "verify", "check", "evaluate", "report", "demo", "schema",
    "compare", "runs", "runs show", "runs tag", "runs note", "runs search", "runs export",
    "runs gc", "gate", "gate promote", "gate baselines", "sweep",
)  # fmt: skip


def check_snapshot(name: str, text: str) -> None:
    """Compare with the stored text; trailing blanks do not count."""
    text = "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
    path = SNAPSHOTS / name
    if os.environ.get("REMAT_UPDATE_SNAPSHOTS") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{name} has no snapshot yet"
    assert text == path.read_text(encoding="utf-8")


def skip_unless_pinned(package: str) -> None:
    """Skip where the package that lays the text out is another version than the snapshot's."""
    installed = importlib.metadata.version(package)
    pin = re.search(rf"^{package}==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert pin is not None
    if installed != pin[1]:
        pytest.skip(f"the snapshot was made with {package} {pin[1]}, here is {installed}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_the_snapshot(run_cli, monkeypatch, command):
    """The help text changes only on purpose."""
    skip_unless_pinned("typer")
    monkeypatch.setenv("COLUMNS", "80")
    done = run_cli(*command.split(), "--help")
    assert done.code == 0
    check_snapshot(f"help_{command.replace(' ', '_') or 'remat'}.txt", done.out)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_help_shows_an_example_and_fits_the_terminal(run_cli, monkeypatch, command, columns):
    """Each help shows an example, and no line is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", columns)
    done = run_cli(*command.split(), "--help")
    assert "Example: remat" in done.out
    assert max(len(line) for line in done.out.splitlines()) <= int(columns)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_as_the_snapshot(run_cli, name):
    """A file format changes only on purpose, and then its schema_version is thought about."""
    skip_unless_pinned("pydantic")
    check_snapshot(f"schema_{name}.json", run_cli("schema", name).out)


def test_package_runs_as_a_module(run_process, run_cli):
    """`python -m remat` is the command line, with its exit codes."""
    assert run_process("-m", "remat", "--version").out == run_cli("--version").out
    assert run_process("-m", "remat", "plan").code == 2
