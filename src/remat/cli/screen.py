"""The terminal: where results, remarks and progress go, and stdout kept clean for machines."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def out() -> Console:
    """Give the console of results: stdout."""
    from rich.console import Console

    return Console(highlight=False)


def err() -> Console:
    """Give the console of remarks, progress and errors: stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """Print an error as one line, which the terminal may wrap but we do not."""
    _print_line("error", "bold red", message)


def note(message: str) -> None:
    """Print a remark on stderr as one line."""
    _print_line("note", "cyan", message)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a Python warning as one line; takes the place of `warnings.showwarning`."""
    del category, filename, lineno, file, line
    _print_line("warning", "yellow", " ".join(str(message).split()))


@contextlib.contextmanager
def machine_output(is_wanted: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that writes to stdout, which nobody else reaches meanwhile where wanted.

    A user's model may print, and so may libraries in C: with `--json` both go to stderr, so that
    stdout holds one JSON document and nothing else.
    """
    if not is_wanted:
        yield _write_line
        return
    stdout = sys.stdout
    stdout.flush()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_c_stdout_on_stderr())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        documents: list[str] = []
        yield documents.append
    for document in documents:
        stdout.write(document + "\n")
    stdout.flush()


@contextlib.contextmanager
def _c_stdout_on_stderr() -> Iterator[None]:
    """Point file descriptor 1 at stderr; does nothing where Python's streams are no such files."""
    try:
        is_plain = sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):  # captured streams have no descriptor
        is_plain = False
    if not is_plain:
        yield
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _write_line(text: str) -> None:
    sys.stdout.write(text + "\n")


def _print_line(label: str, style: str, message: str) -> None:
    from rich.text import Text

    err().print(Text.assemble((f"{label}: ", style), message), soft_wrap=True)
