"""What a generation cost: counters while it runs, one frozen summary at the end."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from treeswarm.protocol.messages import HopTiming
from treeswarm_client.planner.explain import RoundReport
from treeswarm_client.planner.policy import Round


@dataclass(frozen=True)
class TimeSplit:
    """Seconds; they add up to the generation's."""

    draft: float
    wire: float
    """Links, and whatever no other column claims."""
    queue: float
    """Waiting for nodes' devices."""
    compute: float
    """Nodes' forwards, summed over the hops."""


@dataclass(frozen=True)
class Stats:
    """`tokens_per_traversal` counts the bonus token; `acceptance` is the chance that the target's next token was
    in the tree where a tree was shipped, None where none was."""

    traversals: int
    committed: int
    tokens_per_traversal: float
    acceptance: float | None
    drafted: int
    seconds: float
    tokens_per_second: float
    time: TimeSplit

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Trip:
    """One traversal."""

    seconds: float
    compute_s: float
    """Inside forwards, all hops."""
    rows: int
    """Tree nodes or prompt tokens it carried."""


@dataclass
class StatsRecorder:
    """Adds up traversals."""

    traversals: int = 0
    committed: int = 0
    drafted: int = 0
    accepted: int = 0
    misses: int = 0
    draft_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    trips: list[Trip] = field(default_factory=list)
    reports: list[RoundReport] = field(default_factory=list)
    """What was planned for each round, and what came of it."""
    recoveries: list[tuple[float, float]] = field(default_factory=list)
    """When each loss was first noticed, and when the answer after it came; seconds of the client's clock."""

    def add_traversal(self, seconds: float, timings: Sequence[Sequence[HopTiming]]) -> None:
        """Count one traversal.  Its segments overlap on the way: each hop counts its first segment's queue and the
        compute of all."""
        self.traversals += 1
        hops = [
            [segment[i] for segment in timings if i < len(segment)] for i in range(max(map(len, timings), default=0))
        ]
        self.queue_s += sum(hop[0].queue_us for hop in hops) / 1e6
        compute_s = sum(segment.compute_us for hop in hops for segment in hop) / 1e6
        self.compute_s += compute_s
        self.trips.append(Trip(seconds, compute_s, sum(segment.rows for segment in hops[0]) if hops else 0))

    def add_walk(self, flown: Round) -> None:
        """Count what a shipped tree brought: each walk ends at a miss."""
        if len(flown.draft):  # without a tree there was nothing to hit or miss
            self.drafted += len(flown.draft)
            self.accepted += len(flown.found.accepted)
            self.misses += 1

    def summary(self, seconds: float) -> Stats:
        """The figures after `seconds` of generation."""
        tried = self.accepted + self.misses
        claimed = self.draft_s + self.queue_s + self.compute_s
        return Stats(
            traversals=self.traversals,
            committed=self.committed,
            tokens_per_traversal=self.committed / self.traversals if self.traversals else 0.0,
            acceptance=self.accepted / tried if tried else None,
            drafted=self.drafted,
            seconds=seconds,
            tokens_per_second=self.committed / seconds if seconds else 0.0,
            time=TimeSplit(self.draft_s, max(0.0, seconds - claimed), self.queue_s, self.compute_s),
        )
