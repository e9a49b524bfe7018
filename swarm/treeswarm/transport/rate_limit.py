"""A limit to what a program sends: its owner's other traffic keeps the rest of the line."""

import asyncio
from dataclasses import dataclass, field

# A neighbour's frame of a megabyte takes eight seconds at it; clients give a slower one up.
LEAST_RATE = 1e6
# Heartbeats go whatever is owed, and nobody's connection is held for long: where this is owed, they add nothing to it,
# or frames would wait for ever.
MOST_DEBT_S = 2.0


@dataclass(eq=False)
class RateLimiter:
    """Shared by all that sends.  Times are the event loop's, in seconds."""

    rate: float
    """Bits a second."""
    _free_at: float = 0.0
    _turns: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def acquire(self, size: int) -> None:
        """Wait for the turn to send `size` bytes, and charge them then.  Cancelled before, they cost nothing."""
        loop = asyncio.get_running_loop()
        async with self._turns:
            # What is charged meanwhile did not wait either: it comes on top, so that nobody is overtaken for ever.
            await asyncio.sleep(self.owed_s(loop.time()))
            self.charge(size, loop.time())

    def charge(self, size: int, now: float) -> None:
        """`size` bytes are sent now."""
        owed_s = self.owed_s(now)
        if owed_s < MOST_DEBT_S:
            self._free_at = now + owed_s + 8 * size / self.rate

    def owed_s(self, now: float) -> float:
        """Until all that was sent is paid for."""
        return max(0.0, self._free_at - now)
