"""Errors as people and programs see them: one line, one exit code, one table."""

from __future__ import annotations

import json
import platform
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from remat import errors
from remat.cli.screen import print_error

PASSED: Final = 0
CHECK_FAILED: Final = 1
BAD_INPUT: Final = 2
INFEASIBLE: Final = 3
INTERNAL: Final = 70  # EX_SOFTWARE of sysexits.h: not to be taken for a failed check
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

# Complete: a test walks the tree of errors. None means 1: a failed check is a result, no error.
EXIT_CODES: Final[Mapping[type[errors.RematError], int]] = MappingProxyType(
    {
        errors.RematError: BAD_INPUT,
        errors.BudgetFormatError: BAD_INPUT,
        errors.WorkloadError: BAD_INPUT,
        errors.CaptureError: BAD_INPUT,
        errors.BudgetError: INFEASIBLE,
        errors.PlanFileError: BAD_INPUT,
        errors.PlanMismatchError: BAD_INPUT,
        errors.ApplyError: BAD_INPUT,
        errors.VerificationError: BAD_INPUT,
        errors.DeviceError: BAD_INPUT,
        errors.DataError: BAD_INPUT,
        errors.RunError: BAD_INPUT,
        errors.GateError: BAD_INPUT,
        errors.MissingPackageError: BAD_INPUT,
    }
)


def report(error: BaseException, *, as_json: bool, is_debug: bool) -> int:
    """Tell one error on stderr, and on stdout as JSON where asked; return the exit code."""
    code, kind, message = _explain(error)
    if is_debug:
        traceback.print_exception(error, file=sys.stderr)
    print_error(message)
    if as_json:
        facts: dict[str, object] = {"error": kind, "message": message, "exit_code": code}
        if isinstance(error, errors.BudgetError):
            facts |= {
                "budget_bytes": error.budget_bytes,
                "minimum_bytes": error.minimum_bytes,
                "blame": error.blame,
            }
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    return code


def _explain(error: BaseException) -> tuple[int, str, str]:
    """Give the exit code, the kind and the one line of an error."""
    kind = type(error).__name__
    if isinstance(error, errors.RematError):
        return _code_of(type(error)), kind, _one_line(str(error))
    if isinstance(error, KeyboardInterrupt) or kind == "Abort":  # older typers abort on Ctrl-C
        return INTERRUPTED, "Interrupted", "interrupted. No file was left half written."
    if hasattr(error, "format_message"):  # typer's usage errors; their class moved between versions
        return BAD_INPUT, "UsageError", _one_line(_usage(error))
    if isinstance(error, OSError) and error.filename is not None:
        reason = error.strerror or kind
        return BAD_INPUT, kind, f"{str(error.filename)!r}: {reason}."
    if _is_out_of_memory(error):
        return BAD_INPUT, kind, f"the machine ran out of memory: {_one_line(str(error))}"
    return INTERNAL, kind, _ours(error)


def _code_of(kind: type[errors.RematError]) -> int:
    return next(EXIT_CODES[base] for base in kind.__mro__ if base in EXIT_CODES)


def _usage(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", None) or "remat"
    message: str = error.format_message()  # type: ignore[attr-defined]
    message = message.removeprefix("Invalid value: ").rstrip(".")
    return f"{message}. See `{command} --help`."


def _is_out_of_memory(error: BaseException) -> bool:
    """Know it by name and text, as asking torch would import it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _ours(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    torch = sys.modules.get("torch")
    versions = f"remat {sys.modules['remat'].__version__}, Python {platform.python_version()}"
    versions += f", torch {torch.__version__}" if torch else ""
    return (
        f"this is a fault of remat, not of your input: {type(error).__name__}: "
        f"{_one_line(str(error))}{place}. Run the command again with --debug, and report what it "
        f"prints with the command and the versions: {versions}, {platform.system()}."
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
