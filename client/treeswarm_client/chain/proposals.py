"""Proposals of the tail's speculator: trees below the ends of walks, which come after the answers."""

import asyncio
from dataclasses import dataclass, field

from treeswarm.protocol.messages import Proposal
from treeswarm.tasks import cancelled
from treeswarm_client.recent_samples import RecentSamples

# A proposal is waited for so many times as long as the last ones took: they come a few milliseconds after the answer,
# and a round that leaves without one loses most of its tokens.
PATIENCE = 4.0
# Seconds that a proposal is assumed to take before any came, and the least and the most seconds of patience.
FIRST_S, LEAST_S, MOST_S = 0.1, 0.01, 1.0

# After so many waits in vain in a row, 0.8 s together, no proposal is waited for until one comes late: a tail whose
# speculator has failed says nothing of it.
MOST_MISSES = 8


@dataclass(eq=False)
class ProposalInbox:
    """Keeps the newest proposal of one session."""

    _newest: Proposal | None = None
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _delays: RecentSamples = RecentSamples()
    """Seconds from the wait for a proposal until it came."""
    _awaited_tip: int | None = None
    """Id of the node below which a tree was last waited for, until it comes."""
    _awaited_since: float = 0.0
    _misses: int = 0
    """Number of waits in vain since the last proposal that came in time.  Each halves the patience, because a tail that
    is never idle proposes nothing and must not hold every round up."""
    _closed: bool = False

    def add(self, proposal: Proposal) -> None:
        """Take a proposal that has just come."""
        self._newest = proposal
        if proposal.tip == self._awaited_tip:
            self._delays = self._delays.updated(asyncio.get_running_loop().time() - self._awaited_since)
            self._awaited_tip = None
            self._misses = min(self._misses, MOST_MISSES - 1)
        self._arrived.set()

    def close(self) -> None:
        """End every wait: no proposal is of use any more."""
        self._closed = True
        self._arrived.set()

    def get(self, tip: int, root: int) -> Proposal | None:
        """Return the proposal below the node `tip` and the token `root` after it, or None if it has not come."""
        newest = self._newest
        return newest if newest is not None and (newest.tip, newest.root) == (tip, root) else None

    async def wait(self, tip: int, root: int, interrupted: asyncio.Event) -> Proposal | None:
        """Return this proposal as soon as it comes, or None if it takes too long or the chain is interrupted."""
        if (proposal := self.get(tip, root)) is not None or self._closed:
            return proposal
        self._awaited_tip, self._awaited_since = tip, asyncio.get_running_loop().time()
        if self._misses >= MOST_MISSES:
            return None
        patience_s = max(min(PATIENCE * self._delays.location(FIRST_S), MOST_S) / 2**self._misses, LEAST_S)
        arriving = asyncio.create_task(self._arrival(tip, root))
        breaking = asyncio.create_task(interrupted.wait())
        try:
            await asyncio.wait({arriving, breaking}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancelled(arriving)
            await cancelled(breaking)
        proposal = self.get(tip, root)
        if not interrupted.is_set():
            self._misses = 0 if proposal is not None else self._misses + 1
        return proposal

    async def _arrival(self, tip: int, root: int) -> None:
        """Wait until this proposal has come, or is of no use any more."""
        while not self._closed and self.get(tip, root) is None:
            self._arrived.clear()
            await self._arrived.wait()
