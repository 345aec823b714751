"""The commands put together, and the one place where errors become exit codes."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from remat import __version__
from remat.cli import (
    calibrate,
    check,
    compare,
    demo,
    errors,
    evaluate,
    fit,
    gate,
    plan,
    report,
    runs,
    schema,
    sweep,
    verify,
)
from remat.cli.interrupts import remembered
from remat.cli.screen import show_warning

_DEBUG_FLAG = "--debug"
_DEBUG_VARIABLE = "REMAT_DEBUG"


def make_app() -> typer.Typer:
    """Build the typer application: one command per file of this package."""
    app = typer.Typer(
        name="remat",
        rich_markup_mode="markdown",  # joins the lines of a paragraph, which the others do not
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog="Example: remat plan examples/digits_vit.py --budget 60%")(_root)
    for module in (plan, fit, calibrate, verify, check, evaluate, sweep, report):
        app.command(module.NAME, epilog=module.EXAMPLE)(module.command)
    app.add_typer(runs.make_group(), name=runs.NAME, help=runs.SUMMARY)
    app.command(compare.NAME, epilog=compare.EXAMPLE)(compare.command)
    app.add_typer(gate.make_group(), name=gate.NAME, help=gate.SUMMARY)
    for module in (demo, schema):
        app.command(module.NAME, epilog=module.EXAMPLE)(module.command)
    return app


@functools.cache
def _command() -> Any:  # click's, of the copy that typer may bring along
    """Return what runs a line of words; once per process, as the making takes longest of all."""
    return typer.main.get_command(make_app())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error is told in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    is_debug = _DEBUG_FLAG in options or os.environ.get(_DEBUG_VARIABLE, "") not in ("", "0")
    as_json = "--json" in options
    words = [word for word in words if word != _DEBUG_FLAG] or ["--help"]
    with warnings.catch_warnings(), remembered():
        warnings.showwarning = show_warning
        try:
            code = _command()(words, prog_name="remat", standalone_mode=False)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  all become exit codes
            return errors.report(error, as_json=as_json, is_debug=is_debug)
    if code == errors.INTERRUPTED:  # newer typers return it, older ones raise
        return errors.report(KeyboardInterrupt(), as_json=as_json, is_debug=is_debug)
    return code if isinstance(code, int) else 0


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"remat {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            _DEBUG_FLAG,
            help=f"Show the traceback of an error; so does {_DEBUG_VARIABLE}=1. "
            "Allowed anywhere in the line.",
        ),
    ] = False,
) -> None:
    """Fit a PyTorch training step into a memory budget, and prove the gradients unchanged.

    WORKLOAD is PATH.py[:NAME] or package.module[:NAME]: a remat.Workload, or a function that
    returns one. Exit codes: 0 done and passed, 1 done and a check failed, 2 bad input or usage,
    3 infeasible budget.
    """
