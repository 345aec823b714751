"""One cell of a sweep: `remat evaluate` from one seed on one device, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from remat.runs.store import RUN_FILE

_LAST_LINES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One evaluation of a sweep: its folder, and the command that makes it.

    `device` is `cpu`, a card such as `cuda:1`, `cuda` for any card that is free, or `None`: where
    the workload builds its model.
    """

    folder: Path
    seed: int
    budgets: tuple[str, ...]
    arguments: tuple[str, ...]
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a cell ended: the exit code of `remat evaluate`, and its last words."""

    cell: Cell
    exit_code: int
    message: str


def run_cell(cell: Cell, threads: int, visible: str | None = None) -> Ended:
    """Run one cell in a process of its own; go on with the run that its folder holds, if any.

    Arguments
    ---------
    threads: how many it may use: another number sums in another order.
    visible: what CUDA_VISIBLE_DEVICES is to say, so that the cell sees its own card and no other;
        as in this process, unless given.
    """
    holds_run = (cell.folder / RUN_FILE).is_file()
    where = ("--resume" if holds_run else "--out", str(cell.folder))
    done = subprocess.run(  # noqa: S603  our own command, with words and no shell
        [sys.executable, "-m", "remat.cli", *cell.arguments, *where, "--json"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=_environment(threads, visible),
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    message = " ".join(said[-_LAST_LINES:]).removeprefix("error: ")
    return Ended(cell=cell, exit_code=done.returncode, message=message)


def _environment(threads: int, visible: str | None) -> Mapping[str, str]:
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    cards = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return os.environ | counts | cards
