"""Reports of a chain that waits for nodes to appear: why it waits, and how long it still does."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from treeswarm.errors import SwarmError


@dataclass(frozen=True)
class ChainWait:
    """The state of one chain that waits, or has just stopped waiting."""

    session: bytes
    """Id of the session that waits."""
    reason: SwarmError | None
    """Error that names the blocks without nodes, or without nodes that have room; None if the wait is over."""
    remaining_s: float = 0.0
    """Seconds until the chain gives up."""
    succeeded: bool = False
    """Whether the wait ended because nodes appeared."""


OnWait = Callable[[ChainWait], None]
"""Called about twice per second while a chain waits, and once when the wait is over."""


@dataclass(eq=False)
class WaitEvents:
    """Reports the waits of one session to a callback."""

    session: bytes
    notify: OnWait
    _waiting: bool = False

    def report(self, reason: SwarmError, remaining_s: float) -> None:
        """Report that the chain waits, for up to `remaining_s` seconds more."""
        self._waiting = True
        self.notify(ChainWait(self.session, reason, remaining_s))

    def end(self, *, succeeded: bool) -> None:
        """Report the end of a wait, if there is one."""
        if self._waiting:
            self._waiting = False
            self.notify(ChainWait(self.session, None, succeeded=succeeded))

    @contextlib.contextmanager
    def ending_on_exit(self) -> Iterator[None]:
        """Report the end of a wait on leaving the context: a success, or a failure if left with an error."""
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            self.end(succeeded=succeeded)
