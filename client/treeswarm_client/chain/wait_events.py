"""A chain waits for nodes to appear: who wants to know hears why, and how long it still does."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from treeswarm.errors import SwarmError


@dataclass(frozen=True)
class Wait:
    """How things stand with one chain that waits, or has just waited."""

    session: bytes
    why: SwarmError | None
    """What nobody serves, or has room for; None: the wait is over."""
    left_s: float = 0.0
    """How long it still waits before it gives up."""
    goes_on: bool = False
    """Somebody came, and the wait was not for nothing."""


OnWait = Callable[[Wait], None]
"""Called about twice a second while a chain waits, and once when that is over."""


@dataclass(eq=False)
class WaitEvents:
    """Of one chain."""

    session: bytes
    tell: OnWait
    _waiting: bool = False

    def say(self, why: SwarmError, left_s: float) -> None:
        """It waits, up to `left_s` seconds more."""
        self._waiting = True
        self.tell(Wait(self.session, why, left_s))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever waits there are within are over when it is left; in vain where it is left with an error."""
        goes_on = False
        try:
            yield
            goes_on = True
        finally:
            if self._waiting:
                self._waiting = False
                self.tell(Wait(self.session, None, goes_on=goes_on))
