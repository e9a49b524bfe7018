"""Show how far loading is: as a bar on a terminal, or as a line in the log every few seconds."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from treeswarm.programs.units import format_bytes
from treeswarm.progress import CONVERTING, LOADING, PROVING

log = logging.getLogger(__name__)

# Small models are loaded sooner, and need no line.
FIRST_LINE_S = 2.0
LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class LoadingProgress:
    """How far one download or load is, as reported to a `treeswarm.progress.Progress`."""

    done: int
    total: int
    what: str

    def __str__(self) -> str:
        """Return text such as `downloading: 1.20 GiB of 4.50 GiB` or `loading tensors: 34 of 120`."""
        if self.what in (CONVERTING, PROVING):
            return f"{self.what} …"
        if self.what == LOADING:
            return f"{self.what}: {self.done} of {self.total}"
        total = f" of {format_bytes(self.total)}" if self.total else ""
        return f"{self.what}: {format_bytes(self.done)}{total}"

    @property
    def finished(self) -> bool:
        """Whether everything is loaded."""
        return 0 < self.total <= self.done


class LoadingLog:
    """A `Progress` for logs.

    It logs a line after two seconds and every ten seconds, and one at the end of a load that had a line before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what = ""
        self._next = 0.0
        self._logged = False

    def __call__(self, done: int, total: int, what: str) -> None:
        if what == PROVING:  # the node logs its end as that of the whole load
            return
        now = self._clock()
        if what != self._what:
            self._what, self._logged = what, False
            self._next = now + FIRST_LINE_S
        loading = LoadingProgress(done, total, what)
        if now >= self._next or (self._logged and loading.finished):
            self._next = now + LINE_EVERY_S
            self._logged = not loading.finished
            log.info("%s", loading)


class LoadingBar:
    """A `Progress` for terminals: from `start` to `stop` it shows what is being done and for how long."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None

    def start(self, text: str) -> TaskID:
        """Show the bar, if it is not shown yet, with a text for the time before the first amount is known."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(text, total=None)
        return self._task

    def __call__(self, done: int, total: int, what: str) -> None:
        description = str(LoadingProgress(done, total, what))
        # rich stops the clock of a task at its end, but checks and measurements follow the last tensor.
        completed = min(done, total - 1) if total else done
        task = self.start("")
        if what == PROVING:
            self._bar.tasks[0].total = None  # `update` does not make a known total unknown
            self._bar.update(task, completed=0, description=description)
        else:
            self._bar.update(task, completed=completed, total=total or None, description=description)

    def stop(self) -> None:
        """Remove the bar from the terminal."""
        if self._task is not None:
            self._bar.stop()
            self._task = None
