"""Sweeps: the same evaluation from many seeds, under many budgets and on many devices, in parallel.

Every cell of a sweep is `remat evaluate` in a process of its own with one number of threads, so
that it gives the same bits wherever and beside whatever it runs: here, or on Ray. A cell whose
folder holds a run already goes on with it, so that a sweep that was stopped is simply called again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from remat.errors import WorkloadError
from remat.evaluation.cells import Cell, Ended
from remat.evaluation.places import AbstractPlace
from remat.runs.marks import set_tags
from remat.runs.store import RUN_FILE


def make_cells(
    workload: str,
    root: Path,
    name: str,
    *,
    seeds: Sequence[int],
    budgets: Sequence[str],
    devices: Sequence[str] = (),
    apart: bool = False,
    options: Sequence[str] = (),
) -> tuple[Cell, ...]:
    """List the cells: one for each seed and device, and budget where these are kept apart.

    Arguments
    ---------
    name: what the folders of the cells begin with, and the tag of their runs.
    devices: where each is to train, as torch names it; where the workload builds its model, unless
        given.
    options: more options of `remat evaluate`, as words.

    Raises
    ------
    WorkloadError: if there is no seed or no budget.
    """
    if not (seeds and budgets):
        raise WorkloadError("a sweep needs at least one seed and one budget.")
    groups = [(budget,) for budget in budgets] if apart else [tuple(budgets)]
    placed: Sequence[str | None] = tuple(dict.fromkeys(devices)) or (None,)
    return tuple(
        _cell(workload, root, name, seed, group, device, options)
        for device, seed, group in itertools.product(placed, seeds, groups)
    )


def _cell(
    workload: str,
    root: Path,
    name: str,
    seed: int,
    budgets: tuple[str, ...],
    device: str | None,
    options: Sequence[str],
) -> Cell:
    named = "-".join(budget.replace("%", "pct").replace(" ", "") for budget in budgets)
    folder = f"{name}-seed{seed}-{named}"
    asked = [word for budget in budgets for word in ("--budget", budget)]
    if device is not None:
        folder += f"-{device.replace(':', '')}"
        # the process sees no other card than its own, whose number is then 0
        asked += ["--device", device.partition(":")[0]]
    # latencies taken beside other jobs would say nothing
    words = ("evaluate", workload, *asked, "--seed", str(seed), "--no-serving", *options)
    return Cell(folder=root / folder, seed=seed, budgets=budgets, arguments=words, device=device)


def sweep(
    cells: Sequence[Cell],
    place: AbstractPlace,
    *,
    tag: str,
    threads: int = 1,
    on_end: Callable[[Ended], None] = lambda _: None,
) -> tuple[Ended, ...]:
    """Run the cells of a sweep, tag their runs, and return how each ended, in their order.

    A cell that fails stops no other. Results depend on `threads`, and on nothing else of where and
    beside what the cells run; step times do.

    Raises
    ------
    DeviceError: before any cell runs, if one asks for a device that is not there.
    """
    ended: dict[Path, Ended] = {}

    def note(one: Ended) -> None:
        ended[one.cell.folder] = one
        if (one.cell.folder / RUN_FILE).is_file():
            set_tags(one.cell.folder, [tag])
        on_end(one)

    place.run(cells, threads, note)
    return tuple(ended[cell.folder] for cell in cells)
