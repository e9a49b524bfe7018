"""Compares this machine's clock with those of nodes.  Pure, except for `steady_s`, which reads a clock.

Nodes sign records with their own time, and say in every message of records what time they have.  A difference is
believed if most of the nodes compared agree on it, so that one wrong clock changes nothing.
"""

import statistics
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass

from treeswarm.programs.units import format_rough_duration
from treeswarm.protocol.records import LIFETIME_S

# Number of seconds by which the clocks of two honest machines may differ.
CLOCK_SKEW_S = 60.0
SET_CLOCK = "set it with `timedatectl set-ntp true`, or in your system's time settings"


def steady_s() -> float:
    """Return seconds that setting the clock does not change.  Where the system allows it, they pass in sleep too."""
    if sys.platform == "darwin":  # where `time.monotonic` stops in sleep, and this clock does not
        return time.clock_gettime(time.CLOCK_MONOTONIC)
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True)
class ClockSample:
    """What one node's messages say of its clock."""

    peer: str
    """Address of the node."""
    ahead_s: float
    """Seconds by which the time in the message is ahead of this machine's clock."""
    is_fresh: bool = True
    """Whether the message was made just now.  A node's first record may be as old as the registry keeps records."""

    @property
    def difference_s(self) -> float | None:
        """Seconds by which this machine's clock is ahead of the node's, or None if the sample says nothing of it."""
        if self.is_fresh or self.ahead_s > 0:
            return -self.ahead_s
        # An older record is what a dead node leaves behind, and no evidence that this clock is ahead.
        return 0.0 if self.ahead_s > -LIFETIME_S else None


@dataclass(frozen=True)
class ClockDifference:
    """How this machine's clock differs from those of the nodes that agree."""

    ahead_s: float
    """Seconds by which this machine's clock is ahead; negative if it is behind."""
    peers: tuple[str, ...]
    """Addresses of the nodes that agree on it; at least one."""
    compared: int
    """Number of nodes whose clocks were compared."""

    @property
    def is_certain(self) -> bool:
        """Whether this machine's clock is the wrong one, rather than that of a single other node."""
        return len(self.peers) > 1

    def __str__(self) -> str:
        where = f"{format_rough_duration(abs(self.ahead_s))} {'ahead of' if self.ahead_s > 0 else 'behind'}"
        if not self.is_certain:
            return f"this machine's clock is {where} that of {self.peers[0]}, and one of the two is wrong"
        of_all = f" of {self.compared}" if self.compared > len(self.peers) else ""
        return f"this machine's clock is {where} those of {len(self.peers)}{of_all} nodes"


def compare_clocks(samples: Collection[ClockSample], limit_s: float = CLOCK_SKEW_S) -> ClockDifference | None:
    """Return by how much this machine's clock differs from those of most nodes, or None if by at most `limit_s`.

    More than half of the nodes must differ by more than the limit, and in the same direction; the median counts.
    """
    differences = {sample.peer: sample.difference_s for sample in samples if sample.difference_s is not None}
    off = {peer: seconds for peer, seconds in differences.items() if abs(seconds) > limit_s}
    ahead = {peer: seconds for peer, seconds in off.items() if seconds > 0}
    side = ahead if 2 * len(ahead) > len(off) else {peer: s for peer, s in off.items() if peer not in ahead}
    if 2 * len(side) <= len(differences):
        return None
    return ClockDifference(statistics.median_low(side.values()), tuple(sorted(side)), len(differences))


def explain_clock_kept(difference: ClockDifference) -> str:
    """Return the warning for a difference that a client can live with, as it judges records by the nodes' clocks."""
    return f"{difference}; their records are judged by their own clocks: {set_clock(difference)}"


def set_clock(difference: ClockDifference) -> str:
    """Return what to do about a difference."""
    return SET_CLOCK if difference.is_certain else f"if it is this one, {SET_CLOCK}"
