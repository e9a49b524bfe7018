"""A chain waits for nodes to appear: who wants to know hears why, and how long it still does."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from treeswarm.errors import SwarmError


@dataclass(frozen=True)
class ChainWait:
    """How things stand with one chain that waits, or has just waited."""

    session: bytes
    reason: SwarmError | None
    """What nobody serves, or has room for; None: the wait is over."""
    remaining_s: float = 0.0
    """How long it still waits before it gives up."""
    succeeded: bool = False
    """Somebody came, and the wait was not for nothing."""


OnWait = Callable[[ChainWait], None]
"""Called about twice a second while a chain waits, and once when that is over."""


@dataclass(eq=False)
class WaitEvents:
    """Of one chain."""

    session: bytes
    tell: OnWait
    _waiting: bool = False

    def say(self, why: SwarmError, remaining_s: float) -> None:
        """It waits, up to `remaining_s` seconds more."""
        self._waiting = True
        self.tell(ChainWait(self.session, why, remaining_s))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever waits there are within are over when it is left; in vain where it is left with an error."""
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if self._waiting:
                self._waiting = False
                self.tell(ChainWait(self.session, None, succeeded=succeeded))
