"""When training reached its targets: looked for between steps, while the clock rests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from remat.runs.reading import is_reached
from remat.runs.records import EpochQuality

# Looks in an epoch whose length is known, unless said otherwise.
_LOOKS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What training should reach, and how often to look whether it has.

    every: steps between two looks; `None` looks at the end of each epoch only.
    """

    targets: Mapping[str, float]
    every: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """After how many steps, and how many seconds in training, every target was reached."""

    steps: int
    seconds: float


class Clock:
    """Counts the seconds in which it runs."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._before = 0.0
        self._begun: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + (0.0 if self._begun is None else self._now() - self._begun)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run inside the block."""
        self._begun = self._now()
        try:
            yield
        finally:
            self._before, self._begun = self.seconds, None

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Rest inside a block within `running`."""
        self._before, self._begun = self.seconds, None
        try:
            yield
        finally:
            self._begun = self._now()


class Lookout:
    """Watches for the first time that all targets are reached; after that it looks no more."""

    def __init__(self, aim: Aim | None) -> None:
        self._aim = aim
        self.reached: Reached | None = None

    def is_due(self, steps: int) -> bool:
        """Say whether quality is to be looked at after so many steps."""
        aim = self._aim
        if aim is None or aim.every is None or self.reached is not None:
            return False
        return steps % aim.every == 0

    def note(self, quality: EpochQuality, steps: int, seconds: float) -> None:
        """Take what was measured after so many steps and seconds."""
        if self._aim is None or not self._aim.targets or self.reached is not None:
            return
        if is_reached(quality, self._aim.targets):
            self.reached = Reached(steps=steps, seconds=seconds)


def make_aim(
    targets: Mapping[str, float], every: int | None, steps_per_epoch: int | None
) -> Aim | None:
    """Choose how often to look: as asked for, else ten times an epoch if its length is known."""
    if not targets:
        return None
    if every is None and steps_per_epoch is not None:
        every = max(1, steps_per_epoch // _LOOKS)
    return Aim(targets=targets, every=every)
