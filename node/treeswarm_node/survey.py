"""How far the others are: this node's network coordinate, kept by pinging some of them now and then."""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from treeswarm.coordinates import Coordinate, update
from treeswarm.errors import LinkBroken, SwarmError
from treeswarm.messages import DialBack, DialledBack, Ping, Pong
from treeswarm.records import NodeRecord, NodeState
from treeswarm.transport.address import Address
from treeswarm.transport.seam import Stream, StreamKind, Transport

log = logging.getLogger(__name__)

# Pings a visit: the fastest of them is the distance, the others are somebody's busy moment.
PINGS = 4
# Nodes a round.  A coordinate settles within some twenty visits.
VISITS = 3
ANSWER_S = 10.0


@dataclass(eq=False)
class Survey:
    """Where this node stands; `look_at` makes it truer."""

    transport: Transport
    coordinate: Coordinate = Coordinate()

    def as_recorded(self) -> tuple[float, ...]:
        """For the node's record."""
        return astuple(self.coordinate)

    async def look_at(self, others: Sequence[NodeRecord]) -> None:
        """Visit some of them; those that do not answer are no news."""
        there = [record for record in others if record.state is NodeState.ONLINE]
        for record in random.sample(there, min(VISITS, len(there))):
            try:
                round_trip_s = await self._distance(record.dial)
            except (SwarmError, TimeoutError) as error:
                log.info("%s cannot be surveyed: %s", record.address, error)
                continue
            if len(record.coordinate) == len(astuple(self.coordinate)):
                self.coordinate = update(self.coordinate, Coordinate(*record.coordinate), round_trip_s)

    async def dialled_back(self, other: NodeRecord, own: Address) -> bool:
        """Whether another node reaches this one at `own`.  Raises TransportError when it cannot be asked."""
        stream = await self.transport.connect(other.dial, StreamKind.CONTROL)
        try:
            await stream.send(DialBack(str(own)))
            async with asyncio.timeout(ANSWER_S):
                answer = await stream.receive()
        except TimeoutError:
            return False
        finally:
            await stream.end()
        if isinstance(answer, DialledBack) and not answer.reached:
            log.info("%s cannot reach this node at %s: %s", other.address, own, answer.why)
        return isinstance(answer, DialledBack) and answer.reached

    async def _distance(self, address: str) -> float:
        stream = await self.transport.connect(address, StreamKind.CONTROL)
        try:
            async with asyncio.timeout(ANSWER_S):
                return min([await _ping(stream) for _ in range(PINGS)])
        finally:
            await stream.end()


async def _ping(stream: Stream) -> float:
    loop = asyncio.get_running_loop()
    start = loop.time()
    await stream.send(Ping(int(start * 1e6)))
    while (message := await stream.receive()) is not None:
        if isinstance(message, Pong):
            return loop.time() - start
    raise LinkBroken(f"{stream.peer} ended the conversation")
