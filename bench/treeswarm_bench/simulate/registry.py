"""What everybody can know: records that arrive late, are announced again, and expire."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.topology.coordinates import Coordinate
from treeswarm.topology.routing import CandidateTable
from treeswarm.topology.tables import ONLINE, PlacementTable
from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.hosts import Hosts

ABSENT = -1


@dataclass(eq=False)
class RecordTable:
    """What is said of each node, [nodes] each: the truth, or what has got about of it.  `end` follows from length."""

    state: NDArray[np.int64]
    start: NDArray[np.int64]
    free: NDArray[np.int64]
    hop_s: NDArray[np.float64]

    @classmethod
    def none(cls, count: int) -> "RecordTable":
        return cls(np.full(count, ABSENT), np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count))

    def take(self, nodes: NDArray[np.int64]) -> "RecordTable":
        return RecordTable(self.state[nodes], self.start[nodes], self.free[nodes], self.hop_s[nodes])

    def put(self, nodes: NDArray[np.int64], other: "RecordTable") -> None:
        self.state[nodes], self.start[nodes] = other.state, other.start
        self.free[nodes], self.hop_s[nodes] = other.free, other.hop_s


@dataclass(frozen=True, eq=False)
class View:
    """One snapshot, read by everybody until the next poll."""

    layout: PlacementTable
    candidates: CandidateTable


class SimulatedRegistry:
    """`truth` is what nodes would announce now; `view()` what readers see."""

    def __init__(self, hosts: Hosts, agenda: Agenda, random: np.random.Generator) -> None:
        self.hosts, self.agenda, self.random = hosts, agenda, random
        self.truth = RecordTable.none(len(hosts))
        # x, y and height of the coordinate in every node's record.
        self.points = np.zeros((len(hosts), 3))
        self.index = {str(node): i for i, node in enumerate(hosts.ids)}
        self.announced = 0
        self._seen = RecordTable.none(len(hosts))
        self._said_at = np.full(len(hosts), -np.inf)
        self._phase = random.integers(round(config.ANNOUNCE_S / config.POLL_S), size=len(hosts))
        self._polls = 0
        self._on_the_way: tuple[float, NDArray[np.int64], RecordTable] | None = None
        self._view: View | None = None

    def place(self, node: int, coordinate: Coordinate) -> None:
        self.points[node] = coordinate.x, coordinate.y, coordinate.height_s

    def announce(self, node: int) -> None:
        """Say now what is true of `node`; others can read it in some seconds."""
        self.announced += 1
        nodes, at = np.array([node]), self.agenda.now
        said = self.truth.take(nodes)
        self.agenda.after(float(self.random.uniform(*config.PROPAGATION_S)), lambda: self._arrive(at, nodes, said))

    def poll(self) -> None:
        """Time has passed: what was announced again arrives, what was not expires, and readers read."""
        if self._on_the_way:
            self._arrive(*self._on_the_way)
        again = np.flatnonzero((self._phase == self._polls % (self._phase.max() + 1)) & (self.truth.state != ABSENT))
        self._on_the_way = self.agenda.now, again, self.truth.take(again)
        self.announced += len(again)
        self._seen.state[self._said_at < self.agenda.now - config.EXPIRY_S] = ABSENT
        self._polls += 1
        self._view = None

    def everything_is_known(self) -> None:
        """For the start: readers see the truth."""
        self._seen.put(np.arange(len(self.hosts)), self.truth)
        self._said_at[self.truth.state != ABSENT] = self.agenda.now
        self._view = None

    def view(self) -> View:
        if self._view is None:
            layout_of, seen, hosts = np.flatnonzero(self._seen.state != ABSENT), self._seen, self.hosts
            here = np.flatnonzero(seen.state == ONLINE)
            self._view = View(
                PlacementTable(
                    hosts.ids[layout_of],
                    seen.start[layout_of],
                    seen.start[layout_of] + hosts.length[layout_of],
                    hosts.rate[layout_of],
                    seen.state[layout_of],
                ),
                CandidateTable(
                    hosts.ids[here],
                    seen.start[here],
                    seen.start[here] + hosts.length[here],
                    config.ROWS / hosts.rate[here],
                    seen.hop_s[here],
                    seen.free[here],
                    self.points[here],
                ),
            )
        return self._view

    def _arrive(self, said_at: float, nodes: NDArray[np.int64], said: RecordTable) -> None:
        news = self._said_at[nodes] < said_at
        self._seen.put(nodes[news], said.take(np.flatnonzero(news)))
        self._said_at[nodes[news]] = said_at
