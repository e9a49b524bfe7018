"""How long a client avoids nodes that failed it.  Pure: `now` is the time of any clock, in seconds.

The rule, for the real client and for the simulated ones:

* The first failure bans a node for 15 s.  Every further one doubles the ban, up to 15 minutes.
* While a ban lasts nothing changes it.  The client opens no new session on the node, so failures and answers that still
  arrive come from sessions that began before the ban: one incident counts once, and an answer to one session says
  nothing about what broke another.
* After the ban the node may be chosen again.  The answer of a traversal through it proves that it computes and forwards
  again: its failures are forgotten, and the next ban is as short as the first.
* A ping proves less.  A node may answer pings while each append fails, so a round trip forgives nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Petals' first ban: long enough for a restart, short enough to end within one generation.
FIRST_BAN_S = 15.0
# A node that is away for hours is tried again four times per hour; its record will have expired long before.
LONGEST_BAN_S = 900.0
# After this many seconds without a failure the next one counts as the first again.
FORGET_S = 1800.0


@dataclass(frozen=True)
class Ban:
    """The failures of one node and the ban that followed the last of them."""

    failures: int
    """Number of failures since the last answer; those during a ban are not counted."""
    until: float
    """Time at which the ban ends."""


@dataclass(frozen=True)
class BanList:
    """The bans of one client, by node id.  Immutable: methods return a new list, or this one unchanged."""

    bans: Mapping[str, Ban] = field(default_factory=lambda: MappingProxyType({}))
    """The last ban of each node whose failures are remembered, including bans that are over."""

    def with_failure(self, node: str, now: float) -> "BanList":
        """Return the list after a failure of `node`; unchanged while the node is banned."""
        if node in self.banned(now):
            return self
        remembered = self._remembered(now)
        failures = remembered[node].failures + 1 if node in remembered else 1
        # The exponent is limited because a float may not overflow; 2.0 ** 64 is past every cap.
        length = min(FIRST_BAN_S * 2.0 ** min(failures - 1, 64), LONGEST_BAN_S)
        return BanList(MappingProxyType({**remembered, node: Ban(failures, now + length)}))

    def with_answer(self, node: str, now: float) -> "BanList":
        """Return the list after a traversal through `node` was answered; unchanged while the node is banned."""
        if node not in self.bans or node in self.banned(now):
            return self
        remembered = self._remembered(now)
        remembered.pop(node, None)
        return BanList(MappingProxyType(remembered))

    def banned(self, now: float) -> frozenset[str]:
        """Return the nodes to avoid at `now`."""
        return frozenset(name for name, ban in self.bans.items() if now < ban.until)

    def _remembered(self, now: float) -> dict[str, Ban]:
        return {name: ban for name, ban in self.bans.items() if now < ban.until + FORGET_S}
