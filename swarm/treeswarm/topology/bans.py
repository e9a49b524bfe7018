"""How long a client avoids nodes that failed it.  Pure: `now` is the time of any clock, in seconds.

The rule, for the real client and for the simulated ones:

* The first failure bans a node for 15 s.  Every further one doubles the ban, up to 15 minutes.
* While a ban lasts nothing changes it.  Failures and answers that still arrive come from sessions that began before the
  ban: one incident counts once, and an answer to one session says nothing about what broke another.
* A ban orders nodes, and takes none from a client that has no other: a banned node that alone serves some blocks is
  tried again after 1 s, then after twice as long each time, up to 8 s.  So a node that was stopped for some seconds
  serves again as soon as it answers.
* After the ban the node may be chosen again.  The answer of a traversal through it proves that it computes and forwards
  again: its failures are forgotten, and the next ban is as short as the first.
* A ping proves less.  A node may answer pings while each append fails, so a round trip forgives nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

# Petals' first ban: long enough for a restart, short enough to end within one generation.
FIRST_BAN_S = 15.0
# A node that is away for hours is tried again four times per hour; its record will have expired long before.
LONGEST_BAN_S = 900.0
# A try costs a connection, and a node that was only stopped answers the next one.
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 8.0
# After this many seconds without a failure the next one counts as the first again.
FORGET_S = 1800.0


@dataclass(frozen=True)
class Ban:
    """The failures of one node and the ban that followed the last of them."""

    failures: int
    """Number of failures since the last answer; those during a ban are not counted."""
    until: float
    """Time at which the ban ends."""
    retry_at: float = 0.0
    """Time from which the node may be tried during the ban, if no other node serves its blocks."""
    retry_s: float = FIRST_RETRY_S
    """Seconds that the last such pause lasts."""


@dataclass(frozen=True)
class BanList:
    """The bans of one client, by node id.  Immutable: methods return a new list, or this one unchanged."""

    bans: Mapping[str, Ban] = field(default_factory=lambda: MappingProxyType({}))
    """The last ban of each node whose failures are remembered, including bans that are over."""

    def with_failure(self, node: str, now: float) -> "BanList":
        """Return the list after a failure of `node`.  While it is banned, the failure of a try only delays the next."""
        remembered = self._remembered(now)
        if node in self.banned(now):
            ban = self.bans[node]
            if now < ban.retry_at:
                return self
            retry_s = min(2 * ban.retry_s, LONGEST_RETRY_S)
            ban = replace(ban, retry_at=now + retry_s, retry_s=retry_s)
            return BanList(MappingProxyType({**remembered, node: ban}))
        failures = remembered[node].failures + 1 if node in remembered else 1
        # The exponent is limited because a float may not overflow; 2.0 ** 64 is past every cap.
        length = min(FIRST_BAN_S * 2.0 ** min(failures - 1, 64), LONGEST_BAN_S)
        return BanList(MappingProxyType({**remembered, node: Ban(failures, now + length, now + FIRST_RETRY_S)}))

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

    def last_resort(self, now: float) -> frozenset[str]:
        """Return the banned nodes that may be tried at `now` for blocks that no other node serves."""
        return frozenset(name for name, ban in self.bans.items() if ban.retry_at <= now < ban.until)

    def _remembered(self, now: float) -> dict[str, Ban]:
        return {name: ban for name, ban in self.bans.items() if now < ban.until + FORGET_S}
