"""Tells a user at a terminal while generations wait for nodes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from treeswarm_client.chain.wait_events import ChainWait
from treeswarm_client.discovery.overview import clean

# Seconds between two lines about the same wait, which show that the program still runs.
REPEAT_S = 10.0


@dataclass(eq=False)
class WaitNotice:
    """Writes a line when waiting begins, when its reason changes, at intervals, and when it has succeeded.

    Several generations that wait for the same reason share these lines.
    """

    notes: Console
    midline: bool
    """Whether the text so far is on the same screen, so that its line may not have ended."""
    clock: Callable[[], float] = time.monotonic
    _waiting: set[bytes] = field(default_factory=set)
    """Ids of the sessions that wait."""
    _since: float = 0.0
    _written: tuple[str, float] | None = None
    """The last reason, and the time when it was written."""

    def __call__(self, wait: ChainWait) -> None:
        """Handle an event of a chain that waits, or has just waited."""
        now = self.clock()
        if wait.reason is None:
            self._end(wait, now)
            return
        if not self._waiting:
            self._since = now
        self._waiting.add(wait.session)
        # The error that ends the wait says what to do; the notice says only why.
        reason = clean(str(wait.reason).partition(": ")[0])
        if self._written is None or self._written[0] != reason or now - self._written[1] >= REPEAT_S:
            self._write(f"{reason}: waiting, {wait.remaining_s:.0f} s left", new_line=self._written is None)
            self._written = (reason, now)

    def _end(self, wait: ChainWait, now: float) -> None:
        self._waiting.discard(wait.session)
        if self._waiting:
            return
        if wait.succeeded:
            self._write(f"continuing after {now - self._since:.0f} s", new_line=False)
        self._written = None

    def _write(self, line: str, *, new_line: bool) -> None:
        if new_line and self.midline:
            self.notes.print()
        self.notes.print(Text(line, "dim"), soft_wrap=True)
