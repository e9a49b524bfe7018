"""When to look for a faster chain, and when to believe that one is faster.  Pure."""

from collections.abc import Collection
from dataclasses import dataclass

# Records change every minute or so; a look at ten thousand of them takes some 0.1 s.
CHECK_EVERY_S = 10.0


@dataclass(eq=False)
class RerouteTimer:
    """Decides when one working chain is compared with others, and which of its nodes to leave."""

    checked_at: float = 0.0
    """Time of the last comparison, in seconds of the loop's clock."""
    _candidates: frozenset[str] = frozenset()
    """Ids of the nodes that a faster chain would have left out at the last comparison."""

    def is_due(self, now: float) -> bool:
        """Return whether a comparison is due at `now`; if so, take it as made."""
        if now - self.checked_at < CHECK_EVERY_S:
            return False
        self.checked_at = now
        return True

    def confirm(self, candidates: Collection[str]) -> frozenset[str]:
        """Return the ids of the nodes to leave, of those that a faster chain would leave out now.

        Measurements fluctuate, so a node is left only if it was a candidate at the last comparison too.
        """
        before, self._candidates = self._candidates, frozenset(candidates)
        return before & self._candidates
