"""How far the others are: this node's network coordinate, kept by pinging some of them now and then."""

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

# Pings a visit: the fastest of them is the distance, the others are somebody's busy moment.
PINGS = 4
# Nodes a round.  A coordinate settles within some twenty visits.
VISITS = 3
# Half a dozen connections a minute; a node that joins is placed within some minutes.
SURVEY_EVERY_S = 30.0


@dataclass(eq=False)
class DistanceSurvey:
    """Where this node stands; `ping_some` makes it truer."""

    transport: Transport
    coordinate: Coordinate = Coordinate()

    def coordinate_values(self) -> tuple[float, ...]:
        """For the node's record."""
        return astuple(self.coordinate)

    def distance_to(self, record: NodeRecord) -> float:
        """Predicted round trip, seconds; far where the record does not say where it is."""
        position = record.position
        return math.inf if position is None else distance(self.coordinate, position)

    async def run(self, others: Callable[[], Awaitable[Sequence[NodeRecord]]]) -> None:
        """Look at some of them now and then; until cancelled."""
        while True:
            await self.ping_some(await others())
            await asyncio.sleep(SURVEY_EVERY_S * random.uniform(0.5, 1.5))

    async def ping_some(self, others: Sequence[NodeRecord]) -> None:
        """Visit some of them; those that do not answer are no news."""
        there = [record for record in others if record.state is NodeState.ONLINE]
        for record in random.sample(there, min(VISITS, len(there))):
            try:
                round_trip_s = await round_trip(self.transport, record.dial, PINGS)
            except (SwarmError, TimeoutError) as error:
                log.info("%s cannot be surveyed: %s", record.address, error)
                continue
            if record.position is not None:
                self.coordinate = update(self.coordinate, record.position, round_trip_s)
