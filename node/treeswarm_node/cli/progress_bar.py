"""How far loading is, for people: a bar on a terminal, now and then a line in a log."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from treeswarm.progress import LOADING

log = logging.getLogger(__name__)

# Small models are there sooner, and need no word.
FIRST_LINE_S = 2.0
LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Loading:
    """One thing under way, as `treeswarm.progress.Progress` is told it."""

    done: int
    total: int
    what: str

    def __str__(self) -> str:
        """`downloading: 1.2 of 4.5 GB`, `loading tensors: 34 of 120`."""
        if self.what == LOADING:
            return f"{self.what}: {self.done} of {self.total}"
        return f"{self.what}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB"

    @property
    def over(self) -> bool:
        return 0 < self.total <= self.done


class LoadingLog:
    """A `Progress` for logs: a line after a while and every some seconds, and one at the end of what had any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what = ""
        self._next = 0.0
        self._told = False

    def __call__(self, done: int, total: int, what: str) -> None:
        now = self._clock()
        if what != self._what:
            self._what, self._told = what, False
            self._next = now + FIRST_LINE_S
        loading = Loading(done, total, what)
        if now >= self._next or (self._told and loading.over):
            self._next = now + LINE_EVERY_S
            self._told = not loading.over
            log.info("%s", loading)


class LoadingBar:
    """A `Progress` for terminals; `stop` takes the bar away."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            console=console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        loading = str(Loading(done, total, what))
        self._bar.update(self._task, completed=done, total=total or None, description=loading)

    def stop(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._task = None
