"""What a person at a terminal is told while generations wait for nodes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from treeswarm_client.chain.wait_events import ChainWait
from treeswarm_client.discovery.overview import clean

# Whoever reads it knows that the program lives; the reason may fill the line.
AGAIN_S = 10.0


@dataclass(eq=False)
class WaitNotice:
    """A line when waiting begins, when its reason changes and every now and then, and one when it was worth it.

    Several generations that wait for the same are told of once.
    """

    notes: Console
    midline: bool
    """The text so far may stand on the same screen, and its line may not have ended."""
    clock: Callable[[], float] = time.monotonic
    _waiting: set[bytes] = field(default_factory=set)
    _since: float = 0.0
    _said: tuple[str, float] | None = None
    """The last reason, and when it was told."""

    def __call__(self, wait: ChainWait) -> None:
        now = self.clock()
        if wait.reason is None:
            self._over(wait, now)
            return
        if not self._waiting:
            self._since = now
        self._waiting.add(wait.session)
        # What to do about it is for the error that ends the wait.
        why = clean(str(wait.reason).partition(": ")[0])
        if self._said is None or self._said[0] != why or now - self._said[1] >= AGAIN_S:
            self._say(f"{why}: waiting, {wait.remaining_s:.0f} s left", below=self._said is None)
            self._said = (why, now)

    def _over(self, wait: ChainWait, now: float) -> None:
        self._waiting.discard(wait.session)
        if self._waiting:
            return
        if wait.succeeded:
            self._say(f"going on after {now - self._since:.0f} s", below=False)
        self._said = None

    def _say(self, line: str, *, below: bool) -> None:
        if below and self.midline:
            self.notes.print()
        self.notes.print(Text(line, "dim"), soft_wrap=True)
