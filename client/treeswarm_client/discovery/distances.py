"""Distances from this client to nodes: measured round trips, and network coordinates.  Pure."""

from dataclasses import dataclass, field

from treeswarm.protocol.records import NodeRecord
from treeswarm.topology.coordinates import Coordinate, update
from treeswarm.topology.routing import END
from treeswarm_client.discovery.round_trip import RoundTrip


@dataclass(eq=False)
class Distances:
    """What one client knows of its distances to nodes."""

    coordinate: Coordinate = Coordinate()
    """This client's network coordinate."""
    round_trips: dict[str, RoundTrip] = field(default_factory=dict)
    """Measured round-trip times, by node id."""

    def add_round_trip(self, node: str, seconds: float, position: Coordinate | None) -> None:
        """Learn a round-trip time; move this client's coordinate by it if the node's `position` is known."""
        estimate = self.round_trips.get(node, RoundTrip()).with_sample(seconds)
        self.round_trips[node] = estimate
        if position is not None:
            self.coordinate = update(self.coordinate, position, estimate.smoothed)

    def measured(self, *, start: bool, end: bool) -> dict[tuple[str, str], float]:
        """Return measured round trips in seconds, where a chain begins (`start`) or ends (`end`) with this client."""
        seconds = {node: trip.smoothed for node, trip in self.round_trips.items()}
        starts = {(END, node): s for node, s in seconds.items()} if start else {}
        ends = {(node, END): s for node, s in seconds.items()} if end else {}
        return starts | ends

    def position_of(self, record: NodeRecord | None) -> Coordinate:
        """Return a node's coordinate, or this client's own if there is no record."""
        return self.coordinate if record is None else record.position or Coordinate()
