"""Progress of long work on stderr: bars with the time left, or a line per stage in a log."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from typing_extensions import Self

from remat.cli.interrupts import raise_again
from remat.cli.screen import err
from remat.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressBars:
    """Shows the stages of one command; called as `(stage, done, total)`, `total` None if unknown.

    A terminal gets one bar per stage, with the time taken and the time left. Anything else, such
    as the log of a CI job, gets one line when a stage begins.
    """

    def __init__(self, first_stage: str) -> None:
        console = err()
        self._console = console
        self._bars = _make_bars(console) if console.is_terminal else None
        self._stages: dict[str, TaskID | None] = {}
        self._first_stage = first_stage
        self._share = 0.0

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        self(self._first_stage, 0, None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Say how far a stage is; the stages before it are taken to be over."""
        raise_again()
        if stage not in self._stages:
            self._begin(stage, total)
        task = self._stages[stage]
        if self._bars is not None and task is not None:
            self._bars.update(task, completed=done, total=total)

    def by_share(self, what: str, share: float) -> None:
        """Say what is being done, and the share of the first stage that is done, 0 to 1.

        What is done in several rounds may report smaller shares again: the bar never goes back.
        """
        raise_again()
        if share >= 1:  # the end of a round; the end of all is when the block is left
            return
        self._share = max(self._share, share)
        if self._bars is None:
            self(what, 0, None)
            return
        task = self._stages[self._first_stage]
        assert task is not None
        self._bars.update(task, description=what, completed=self._share, total=1)

    def _begin(self, stage: str, total: int | None) -> None:
        if self._bars is None:
            self._stages[stage] = None
            steps = f" ({total} steps)" if total else ""
            self._console.print(f"{stage}{steps} ...", style="dim", soft_wrap=True)
            return
        for task in self._stages.values():
            if task is not None:
                self._bars.stop_task(task)
                self._bars.update(task, total=1, completed=1)
        self._stages[stage] = self._bars.add_task(stage, total=total)


def _make_bars(console: object) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    assert isinstance(console, Console)

    class TimeLeft(TimeRemainingColumn):
        """The time left in words; nothing where it cannot be known."""

        def render(self, task: Task) -> Text:
            if task.finished or not task.time_remaining:
                return Text("")
            return Text(f"{_in_seconds(task.time_remaining)} left", style="cyan")

    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeLeft(),
        console=console,
        transient=True,  # what the command found is what stays on the screen
    )


def _in_seconds(duration: float) -> str:
    """Write an estimate without a precision that it does not have."""
    return f"{round(duration)} s" if duration < 60 else format_seconds(duration)
