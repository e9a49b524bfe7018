"""A registry whose records arrive late, are announced again, and expire."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.topology.coordinates import Coordinate
from treeswarm.topology.routing import CandidateTable
from treeswarm.topology.tables import ONLINE, PlacementTable
from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.hosts import SimulatedHosts

ABSENT = -1


@dataclass(eq=False)
class RecordTable:
    """The changing part of every node's record, true or as readers see it.  Each array has shape [nodes].

    The end of a span is not here: it follows from its start and the host's `length`.
    """

    state: NDArray[np.int64]
    """A state of `topology.tables`, or ABSENT."""
    start: NDArray[np.int64]
    """First block of the span."""
    free: NDArray[np.int64]
    """Number of free positions of the KV cache."""
    hop_s: NDArray[np.float64]
    """Seconds that a visit takes beside the computation of its rows."""

    @classmethod
    def none(cls, count: int) -> "RecordTable":
        """Make a table of `count` absent nodes."""
        return cls(np.full(count, ABSENT), np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count))

    def take(self, nodes: NDArray[np.int64]) -> "RecordTable":
        """Return a copy of the rows of `nodes`."""
        return RecordTable(self.state[nodes], self.start[nodes], self.free[nodes], self.hop_s[nodes])

    def put(self, nodes: NDArray[np.int64], other: "RecordTable") -> None:
        """Replace the rows of `nodes` by those of `other`."""
        self.state[nodes], self.start[nodes] = other.state, other.start
        self.free[nodes], self.hop_s[nodes] = other.free, other.hop_s


@dataclass(frozen=True, eq=False)
class RegistryView:
    """One snapshot of the registry, which all readers use until the next poll."""

    layout: PlacementTable
    candidates: CandidateTable


class SimulatedRegistry:
    """Delays the records of all nodes: `truth` is what nodes would announce now, `view()` what readers see."""

    def __init__(self, hosts: SimulatedHosts, agenda: Agenda, random: np.random.Generator) -> None:
        self.hosts, self.agenda, self.random = hosts, agenda, random
        self.truth = RecordTable.none(len(hosts))
        # x, y and height of the coordinate in every node's record, [nodes, 3].
        self.points = np.zeros((len(hosts), 3))
        self.index = {str(node): i for i, node in enumerate(hosts.ids)}
        self.announced = 0
        self._seen = RecordTable.none(len(hosts))
        self._announced_at = np.full(len(hosts), -np.inf)
        self._phase = random.integers(round(config.ANNOUNCE_S / config.POLL_S), size=len(hosts))
        self._polls = 0
        self._in_transit: tuple[float, NDArray[np.int64], RecordTable] | None = None
        self._view: RegistryView | None = None

    def place(self, node: int, coordinate: Coordinate) -> None:
        """Set the coordinate in the record of `node`."""
        self.points[node] = coordinate.x, coordinate.y, coordinate.height_s

    def announce(self, node: int) -> None:
        """Publish the truth about `node`; readers see it some seconds later."""
        self.announced += 1
        nodes, at = np.array([node]), self.agenda.now
        records = self.truth.take(nodes)
        self.agenda.after(float(self.random.uniform(*config.PROPAGATION_S)), lambda: self._arrive(at, nodes, records))

    def poll(self) -> None:
        """Deliver the records announced again since the last poll, expire old ones, and give readers a new view."""
        if self._in_transit:
            self._arrive(*self._in_transit)
        due = np.flatnonzero((self._phase == self._polls % (self._phase.max() + 1)) & (self.truth.state != ABSENT))
        self._in_transit = self.agenda.now, due, self.truth.take(due)
        self.announced += len(due)
        self._seen.state[self._announced_at < self.agenda.now - config.EXPIRY_S] = ABSENT
        self._polls += 1
        self._view = None

    def publish_all(self) -> None:
        """Let readers see the truth about all nodes at once, as at the start of a simulation."""
        self._seen.put(np.arange(len(self.hosts)), self.truth)
        self._announced_at[self.truth.state != ABSENT] = self.agenda.now
        self._view = None

    def view(self) -> RegistryView:
        """Return the snapshot that all readers use until the next poll."""
        if self._view is None:
            present, seen, hosts = np.flatnonzero(self._seen.state != ABSENT), self._seen, self.hosts
            online = np.flatnonzero(seen.state == ONLINE)
            self._view = RegistryView(
                PlacementTable(
                    hosts.ids[present],
                    seen.start[present],
                    seen.start[present] + hosts.length[present],
                    hosts.rate[present],
                    seen.state[present],
                ),
                CandidateTable(
                    hosts.ids[online],
                    seen.start[online],
                    seen.start[online] + hosts.length[online],
                    config.ROWS / hosts.rate[online],
                    seen.hop_s[online],
                    seen.free[online],
                    self.points[online],
                ),
            )
        return self._view

    def _arrive(self, announced_at: float, nodes: NDArray[np.int64], records: RecordTable) -> None:
        newer = self._announced_at[nodes] < announced_at
        self._seen.put(nodes[newer], records.take(np.flatnonzero(newer)))
        self._announced_at[nodes[newer]] = announced_at
