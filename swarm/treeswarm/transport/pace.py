"""A limit to what a program sends: its owner's other traffic keeps the rest of the line."""

from dataclasses import dataclass

# A neighbour's frame of a megabyte takes eight seconds at it; clients give a slower one up.
LEAST_RATE = 1e6


@dataclass(eq=False)
class Pace:
    """Shared by all that sends.  Times are the event loop's, in seconds."""

    rate: float
    """Bits a second."""
    _free_at: float = 0.0

    def take(self, size: int, now: float) -> float:
        """Seconds that whoever wants to send `size` bytes must wait first; they count from then on."""
        start = max(now, self._free_at)
        self._free_at = start + 8 * size / self.rate
        return start - now

    def took(self, size: int, now: float) -> float:
        """Seconds that whoever has just sent `size` bytes must wait before the next ones."""
        return self.take(size, now) + 8 * size / self.rate
