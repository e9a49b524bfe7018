"""Which nodes a client leaves alone for a while because they failed it.  Pure: `now` is any clock's seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Petals' first ban; long enough for a restart, short enough to be forgiven within one generation.
FIRST_BAN_S = 15.0
# A node that is away for hours is looked at again four times an hour: its record will have expired long before.
LONGEST_BAN_S = 900.0
# After this long without a failure the next one counts as the first again.
FORGET_S = 1800.0


@dataclass(frozen=True)
class Ban:
    """Failures in a row, and the time until which the node is left alone."""

    failures: int
    until: float


@dataclass(frozen=True)
class BanList:
    """15 s after the first failure, doubling up to a cap; one answer forgives everything."""

    bans: Mapping[str, Ban] = field(default_factory=lambda: MappingProxyType({}))

    def failed(self, node: str, now: float) -> "BanList":
        """With one more failure of `node`.  While it is banned nobody asks it anew: what fails then are sessions that
        had begun before, side by side, and one incident counts once."""
        if node in self.banned(now):
            return self
        remembered = {name: ban for name, ban in self.bans.items() if now < ban.until + FORGET_S}
        failures = remembered[node].failures + 1 if node in remembered else 1
        # 2.0 ** 64 is past every cap, and a float may not overflow.
        length = min(FIRST_BAN_S * 2.0 ** min(failures - 1, 64), LONGEST_BAN_S)
        return BanList(MappingProxyType({**remembered, node: Ban(failures, now + length)}))

    def answered(self, node: str, now: float) -> "BanList":
        """Without `node`, and without what was long ago."""
        if node not in self.bans:
            return self
        return BanList(
            MappingProxyType(
                {name: ban for name, ban in self.bans.items() if name != node and now < ban.until + FORGET_S}
            )
        )

    def banned(self, now: float) -> frozenset[str]:
        """The nodes to avoid now."""
        return frozenset(name for name, ban in self.bans.items() if now < ban.until)

    def until(self, node: str) -> float | None:
        """When the last ban of `node` ends or ended; None if it is not known to have failed."""
        ban = self.bans.get(node)
        return ban.until if ban else None
