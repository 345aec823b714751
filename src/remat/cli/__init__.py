"""The command line: parse, call one public function, print."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `remat ARGUMENTS` (those of the process unless given) and return the exit code.

    0: done, and every check passed. 1: done, and a check failed. 2: bad input or usage.
    3: infeasible budget. 70: an error of remat's own. 130: interrupted.
    """
    from remat.cli.app import run

    return run(arguments)
