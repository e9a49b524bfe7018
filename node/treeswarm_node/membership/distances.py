"""Keep this node's network coordinate current by pinging some other nodes from time to time."""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple, dataclass

from treeswarm.errors import SwarmError
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.topology.coordinates import Coordinate, distance, update
from treeswarm.transport.ping import round_trip
from treeswarm.transport.seam import Transport

log = logging.getLogger(__name__)

# Pings per visit: the fastest of them is the distance, the others met a busy moment of one of the two nodes.
PINGS = 4
# Nodes pinged per survey.  A coordinate settles within some twenty visits.
VISITS = 3
# Half a dozen connections per minute; a node that joins is placed within some minutes.
SURVEY_EVERY_S = 30.0


@dataclass(eq=False)
class DistanceSurvey:
    """Holds this node's network coordinate; every visit to another node makes it more precise."""

    transport: Transport
    coordinate: Coordinate = Coordinate()
    on_visit: Callable[[NodeRecord, Exception | None], None] = lambda *_: None
    """Called after every visit with the node's record, and with the error if it did not answer."""

    def coordinate_values(self) -> tuple[float, ...]:
        """Return the coordinate as the numbers that the node's record carries."""
        return astuple(self.coordinate)

    def distance_to(self, record: NodeRecord) -> float:
        """Return the predicted round trip to a node in seconds, or infinity if its record has no coordinate."""
        return math.inf if record.position is None else distance(self.coordinate, record.position)

    async def run(self, other_nodes: Callable[[], Awaitable[Sequence[NodeRecord]]]) -> None:
        """Ping some of the other nodes about every SURVEY_EVERY_S seconds until cancelled."""
        while True:
            await self.ping_some(await other_nodes())
            await asyncio.sleep(SURVEY_EVERY_S * random.uniform(0.5, 1.5))

    async def ping_some(self, records: Sequence[NodeRecord]) -> None:
        """Ping up to VISITS of the nodes that are online.  A node that does not answer changes nothing."""
        online = [record for record in records if record.state is NodeState.ONLINE]
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
