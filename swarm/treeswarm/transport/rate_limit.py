"""A limit on the rate at which a program sends, so that its owner's other traffic gets the rest of the connection."""

import asyncio
from dataclasses import dataclass, field

# Lowest allowed rate in bits per second.  A neighbour's frame of one megabyte takes eight seconds at it; clients give
# up on a slower node.
LEAST_RATE = 1e6
# Heartbeats are sent whatever the debt.  At this debt in seconds they add nothing to it: otherwise frames would wait
# without end.  Connections are never held for longer than this.
MOST_DEBT_S = 2.0


@dataclass(eq=False)
class RateLimiter:
    """A rate shared by everything that a program sends.  Times are the event loop's, in seconds."""

    rate: float
    """Rate in bits per second."""
    _free_at: float = 0.0
    """Time at which all bytes charged so far have been sent at `rate`."""
    _turns: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def acquire(self, size: int) -> None:
        """Wait for a turn to send `size` bytes, and charge them then.  If cancelled before, nothing is charged."""
        loop = asyncio.get_running_loop()
        async with self._turns:
            # Control streams charge bytes during this wait without waiting themselves.  The debt that they add is not
            # waited for again: otherwise a link could be overtaken without end.
            await asyncio.sleep(self.owed_s(loop.time()))
            self.charge(size, loop.time())

    def charge(self, size: int, now: float) -> None:
        """Count `size` bytes that are sent at the time `now` without waiting for a turn."""
        owed_s = self.owed_s(now)
        if owed_s < MOST_DEBT_S:
            self._free_at = now + owed_s + 8 * size / self.rate

    def owed_s(self, now: float) -> float:
        """Return the seconds until all bytes charged so far fit within the rate."""
        return max(0.0, self._free_at - now)
