"""What a generation cost: a recorder while it runs, one frozen summary at the end."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from treeswarm.protocol.drive_messages import DrivenTraversal
from treeswarm.protocol.messages import HopTiming
from treeswarm_client.planner.explain import RoundReport
from treeswarm_client.planner.policy import Round


@dataclass(frozen=True)
class TimeSplit:
    """Where the seconds of a generation went; the parts add up to the whole."""

    draft: float
    """Seconds for which rounds waited for their draft while nothing travelled."""
    wire: float
    """Seconds on links, and all that no other part claims."""
    queue: float
    """Seconds of waiting for nodes' devices."""
    compute: float
    """Seconds of nodes' forwards, summed over the hops."""


@dataclass(frozen=True)
class Stats:
    """The statistics of one generation."""

    traversals: int
    committed: int
    """Number of tokens committed."""
    tokens_per_traversal: float
    """Number of tokens per traversal, the bonus token included."""
    acceptance: float | None
    """Chance that the target's next token was in the tree where a tree was shipped; None where none was."""
    drafted: int
    """Number of drafted nodes shipped."""
    seconds: float
    tokens_per_second: float
    time: TimeSplit
    proposals: int = 0
    """Number of trees that the tail proposed and that came in time for a round of this client."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TraversalTime:
    """What one traversal took."""

    seconds: float
    compute_s: float
    """Seconds inside forwards, summed over the hops."""
    rows: int
    """Number of tree nodes or prompt tokens that it carried."""
    queue_s: float = 0.0
    """Seconds of waiting for devices, summed over the hops."""


@dataclass
class StatsRecorder:
    """Adds up traversals and rounds."""

    committed: int = 0
    """Number of tokens committed."""
    drafted: int = 0
    """Number of drafted nodes shipped."""
    accepted: int = 0
    """Number of drafted nodes that the target's walks followed."""
    misses: int = 0
    """Number of walks that left a shipped tree."""
    draft_s: float = 0.0
    """Seconds for which rounds waited for their draft while nothing travelled."""
    proposals: int = 0
    """Number of trees that the tail proposed and that came in time for a round."""
    traversal_times: list[TraversalTime] = field(default_factory=list)
    """One entry per traversal, the prompt's first."""
    reports: list[RoundReport] = field(default_factory=list)
    """What was planned for each round, and what came of it."""
    recoveries: list[tuple[float, float]] = field(default_factory=list)
    """When each loss was first noticed, and when the answer after it came; seconds of the client's clock."""

    @property
    def traversals(self) -> int:
        """Number of traversals, the prompt's included."""
        return len(self.traversal_times)

    def add_traversal(self, seconds: float, timings: Sequence[Sequence[HopTiming]]) -> None:
        """Count one traversal; `timings` are per append and hop.

        Appends overlap on the way: each hop counts the queue of its first one and the compute of all.
        """
        hops = [
            [segment[i] for segment in timings if i < len(segment)] for i in range(max(map(len, timings), default=0))
        ]
        queue_s = sum(hop[0].queue_us for hop in hops) / 1e6
        compute_s = sum(segment.compute_us for hop in hops for segment in hop) / 1e6
        rows = sum(segment.rows for segment in hops[0]) if hops else 0
        self.traversal_times.append(TraversalTime(seconds, compute_s, rows, queue_s))

    def add_walk(self, finished: Round) -> None:
        """Count what a shipped tree brought: each walk ends at a miss."""
        if len(finished.draft):  # without a tree there was nothing to hit or miss
            self.drafted += len(finished.draft)
            self.accepted += len(finished.walk.accepted)
            self.misses += 1

    def add_driven(self, costs: DrivenTraversal, committed: int) -> None:
        """Count one traversal that a driver made, and the tokens that it brought."""
        seconds, compute_s, queue_s = costs.seconds_us / 1e6, costs.compute_us / 1e6, costs.queue_us / 1e6
        self.traversal_times.append(TraversalTime(seconds, compute_s, costs.rows, queue_s))
        self.committed += committed
        self.drafted += costs.drafted
        self.accepted += costs.accepted
        self.misses += costs.missed
        self.draft_s += costs.draft_us / 1e6

    def summary(self, seconds: float) -> Stats:
        """Return the statistics after `seconds` of generation."""
        judged = self.accepted + self.misses
        queue_s = sum(traversal.queue_s for traversal in self.traversal_times)
        compute_s = sum(traversal.compute_s for traversal in self.traversal_times)
        wire_s = max(0.0, seconds - (self.draft_s + queue_s + compute_s))
        return Stats(
            traversals=self.traversals,
            committed=self.committed,
            tokens_per_traversal=self.committed / self.traversals if self.traversals else 0.0,
            acceptance=self.accepted / judged if judged else None,
            drafted=self.drafted,
            seconds=seconds,
            tokens_per_second=self.committed / seconds if seconds else 0.0,
            time=TimeSplit(self.draft_s, wire_s, queue_s, compute_s),
            proposals=self.proposals,
        )
