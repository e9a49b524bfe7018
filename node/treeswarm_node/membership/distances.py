"""Keep this node's network coordinate current by pinging some other nodes from time to time."""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple, dataclass

from treeswarm.errors import SwarmError
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.topology.coordinates import WORST_ERROR, Coordinate, distance, update
from treeswarm.transport.ping import round_trip
from treeswarm.transport.seam import Transport

log = logging.getLogger(__name__)

# Pings per visit: the fastest of them is the distance, the others met a busy moment of one of the two nodes.
PINGS = 4
# Nodes pinged per survey.  A coordinate settles within some twenty visits.
VISITS = 3
# Half a dozen connections per minute.
SURVEY_EVERY_S = 30.0
# The first surveys follow sooner, until the coordinate's relative error is half of what others still compare, 0.5; if
# it stays larger, so many surveys are enough.
FIRST_SURVEYS_S, SETTLED, MOST_FIRST_SURVEYS = 5.0, 0.25, 24
# Others hear of a coordinate once its error is this share of the announced one.  With both rules, all coordinates of 3
# to 9 new nodes are below 0.5 after 34 to 45 s (median), and a new node's in a settled swarm after 8 to 15 s; with
# SURVEY_EVERY_S and a record per minute it took 169 to 202 s and 59 to 86 s (simulated with `update`, 2026-11-30).
MORE_PRECISE = 0.65


@dataclass(eq=False)
class DistanceSurvey:
    """Holds this node's network coordinate; every visit to another node makes it more precise."""

    transport: Transport
    coordinate: Coordinate = Coordinate()
    on_visit: Callable[[NodeRecord, Exception | None], None] = lambda *_: None
    """Called after every visit with the node's record, and with the error if it did not answer."""
    on_settling: Callable[[], None] = lambda: None
    """Called when the coordinate is so much more precise that others should hear of it."""
    _told_error: float = WORST_ERROR
    """Error of the coordinate when others last heard of it."""
    _surveys: int = 0
    """Number of surveys that found a node to ping."""

    @property
    def pause_s(self) -> float:
        """Seconds until the next survey, on average."""
        is_new = self.coordinate.error > SETTLED and self._surveys < MOST_FIRST_SURVEYS
        return FIRST_SURVEYS_S if is_new else SURVEY_EVERY_S

    def coordinate_values(self) -> tuple[float, ...]:
        """Return the coordinate as the numbers that the node's record carries."""
        return astuple(self.coordinate)

    def distance_to(self, record: NodeRecord) -> float:
        """Return the predicted round trip to a node in seconds, or infinity if its record has no coordinate."""
        return math.inf if record.position is None else distance(self.coordinate, record.position)

    async def run(self, other_nodes: Callable[[], Awaitable[Sequence[NodeRecord]]]) -> None:
        """Ping some of the other nodes again and again until cancelled, more often while the coordinate is new."""
        while True:
            await self.ping_some(await other_nodes())
            await asyncio.sleep(self.pause_s * random.uniform(0.5, 1.5))

    async def ping_some(self, records: Sequence[NodeRecord]) -> None:
        """Ping up to VISITS of the nodes that are online.  A node that does not answer changes nothing."""
        online = [record for record in records if record.state is NodeState.ONLINE]
        self._surveys += bool(online)
        for record in random.sample(online, min(VISITS, len(online))):
            try:
                round_trip_s = await round_trip(self.transport, record.dial, PINGS)
            except (SwarmError, TimeoutError) as error:
                self.on_visit(record, error)
                log.info("the distance to %s could not be measured: %s", record.address, error)
                continue
            self.on_visit(record, None)
            if record.position is not None:
                self.coordinate = update(self.coordinate, record.position, round_trip_s)
        if self.coordinate.error <= MORE_PRECISE * self._told_error:
            self._told_error = self.coordinate.error
            self.on_settling()
