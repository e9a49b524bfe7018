"""Attempts at a repair, and a record of the repairs that succeeded."""

import asyncio
from dataclasses import dataclass

from treeswarm.errors import MissingBlocks
from treeswarm_client.discovery.route import Hop

# More dead nodes in a row than this were never seen in a simulated swarm that loses a fifth of its nodes an hour.
QUICK_ATTEMPTS = 8
PAUSE_S = 0.5


@dataclass(frozen=True)
class Repair:
    """One repair of a chain."""

    epoch: int
    """Number of the epoch that the repair began."""
    lost: tuple[tuple[Hop, str], ...]
    """Nodes that left the chain, each with the reason."""
    gained: tuple[Hop, ...]
    """Nodes that joined the chain."""
    seconds: float
    """Seconds from the first sign of a failure to a chain that takes appends again.  The replay may still run."""


@dataclass(eq=False)
class RepairAttempts:
    """The attempts at repairing one chain since its last answer."""

    until: float
    """Time of the loop's clock, in seconds, at which the chain's patience ends."""
    failed: int = 0
    """Number of attempts that failed because another node failed meanwhile."""

    async def pause(self) -> None:
        """Count a failed attempt, and wait before the next one unless there were few so far.

        The first attempts follow each other at once, since each finds another record out of date.  A router that names
        the same dead nodes again and again must neither keep this client busy nor make it wait for ever.  Raises
        MissingBlocks when the patience has ended.
        """
        self.failed += 1
        if self.failed > QUICK_ATTEMPTS:
            if asyncio.get_running_loop().time() > self.until:
                raise MissingBlocks(f"no chain held: {self.failed} times a node failed while the chain was repaired")
            await asyncio.sleep(PAUSE_S)
