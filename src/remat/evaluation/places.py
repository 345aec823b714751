"""Where the cells of a sweep run: in processes of this machine, or as tasks of a Ray cluster.

A cell that trains on a card has it to itself: no two cells share one at a time. It sees no other
card, and a cell on the CPU sees none, so that a workload that takes what it finds takes its own.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from remat.errors import DeviceError, MissingPackageError
from remat.evaluation.cells import Cell, Ended, run_cell
from remat.evaluation.placing import ANY_CUDA, CPU, can_take, check_device

# Any: Ray comes without types.

_NO_CARD = ""


class AbstractPlace(ABC):
    """Where the cells of a sweep run."""

    @abstractmethod
    def run(self, cells: Sequence[Cell], threads: int, on_end: Callable[[Ended], None]) -> None:
        """Run every cell with so many threads, and tell each as it ends.

        Raises
        ------
        DeviceError: before any cell runs, if one asks for a device that is not there.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalProcesses(AbstractPlace):
    """Processes on this machine, so many at a time.

    `cards` names the accelerators that cells may have, with what CUDA_VISIBLE_DEVICES calls each.
    """

    jobs: int
    cards: Mapping[str, str] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell], threads: int, on_end: Callable[[Ended], None]) -> None:
        """Run the cells; those that are not begun when one raises are not begun."""
        for cell in cells:
            if cell.device is not None:
                check_device(cell.device, self.cards)
        waiting = list(cells)
        running: dict[Future[Ended], str | None] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            while waiting or running:
                free = self.cards.keys() - running.values()
                while len(running) < self.jobs and (found := next_cell(waiting, free)):
                    cell, card = found
                    waiting.remove(cell)
                    free -= {card}
                    visible = self._visible(cell, card)
                    running[pool.submit(run_cell, cell, threads, visible)] = card
                for one in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[one]
                    on_end(one.result())

    def _visible(self, cell: Cell, card: str | None) -> str | None:
        if card is not None:
            return self.cards[card] or None
        return _NO_CARD if cell.device == CPU else None


def next_cell(waiting: Sequence[Cell], free: Collection[str]) -> tuple[Cell, str | None] | None:
    """Pick the first waiting cell that can begin, and its card; `None` where all have to wait.

    Of several free cards a cell takes the one that the fewest others wait for by name.
    """
    for cell in waiting:
        if cell.device in (None, CPU):
            return cell, None
        fitting = sorted(card for card in free if can_take(cell.device, card))
        if fitting:
            return cell, min(fitting, key=[one.device for one in waiting].count)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnRay(AbstractPlace):
    """Tasks on a Ray cluster, the one that RAY_ADDRESS names or one of this machine.

    The workers need the same Python environment, and the folders of the sweep on a shared disk.
    Ray hands out the cards of the cluster itself, one to each cell on `cuda`. It looks for metadata
    of clouds when it starts, for which there is no switch; usage statistics are off unless
    RAY_USAGE_STATS_ENABLED says otherwise.
    """

    jobs: int

    def run(self, cells: Sequence[Cell], threads: int, on_end: Callable[[Ended], None]) -> None:
        """Run the cells as tasks.

        Raises
        ------
        MissingPackageError: with the install command, if Ray is not installed.
        DeviceError: if the cluster has no card for a cell, or one asks for a card by its number.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise MissingPackageError("ray", "ray", "A sweep on Ray") from error
        own: dict[str, Any] = {}
        if not os.environ.get("RAY_ADDRESS"):
            own = {"num_cpus": self.jobs * threads, "include_dashboard": False}
        cluster: Any = ray
        cluster.init(log_to_driver=False, logging_level=logging.ERROR, **own)
        try:
            num_cards = int(cluster.cluster_resources().get("GPU", 0))
            for cell in cells:
                _check_on_ray(cell, num_cards)
            left = [_task(ray, cell, threads) for cell in cells]
            while left:
                ready, left = ray.wait(left)
                on_end(ray.get(ready[0]))
        finally:
            ray.shutdown()


def _task(ray: Any, cell: Cell, threads: int) -> Any:
    # Ray sets CUDA_VISIBLE_DEVICES of a task to the card that it gave it
    visible = _NO_CARD if cell.device == CPU else None
    num_cards = 1 if cell.device == ANY_CUDA else 0
    task = ray.remote(num_cpus=threads, num_gpus=num_cards)(run_cell)
    return task.remote(cell, threads, visible)


def _check_on_ray(cell: Cell, num_cards: int) -> None:
    there = f"{CPU}, {ANY_CUDA} ({num_cards} of them)" if num_cards else CPU
    if cell.device in (None, CPU) or (cell.device == ANY_CUDA and num_cards):
        return
    raise DeviceError(
        f"device {cell.device!r} is not in the Ray cluster, which hands out its cards without "
        f"numbers: there is {there}."
    )
