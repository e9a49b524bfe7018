"""When a working chain is thought over again, and when to believe that another is faster.  Pure."""

from collections.abc import Collection
from dataclasses import dataclass

# Records change every minute or so; a look at ten thousand of them takes some 0.1 s.
RECONSIDER_S = 10.0


@dataclass(eq=False)
class RerouteTimer:
    """Of one chain."""

    had_at: float = 0.0
    _better_without: frozenset[str] = frozenset()

    def due(self, now: float) -> bool:
        """Whether to think again; then they are had now."""
        if now - self.had_at < RECONSIDER_S:
            return False
        self.had_at = now
        return True

    def leave(self, better_without: Collection[str]) -> frozenset[str]:
        """The nodes to leave, of those that a faster chain would do without today.

        Measurements come and go; what was better a while ago and still is will stay so.
        """
        before, self._better_without = self._better_without, frozenset(better_without)
        return before & self._better_without
