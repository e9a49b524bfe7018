"""Nodes that survey each other believe nobody too much."""

import asyncio

import pytest
from tests.support.registry_media import Node

from treeswarm.protocol.messages import Pong
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.topology.coordinates import Coordinate, update
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_node.membership.distances import DistanceSurvey


async def surveyed(answers: int, *told: float) -> Coordinate:
    """The coordinate of a node after a visit to one that says it is at `told`, answers some pings and ends."""
    network = MemoryNetwork()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        for _ in range(answers):
            await stream.receive()
            await stream.send(Pong(0))

    listener = await network.transport().listen("127.0.0.1:0", accept)
    changes = {"address": listener.address, "pin": "", "coordinate": told, "state": NodeState.ONLINE}
    record: NodeRecord = Node().record(**changes).record
    survey = DistanceSurvey(network.transport())
    await survey.ping_some([record])
    await listener.close()
    return survey.coordinate


@pytest.mark.timeout(20)
async def test_a_node_that_ends_the_conversation_is_no_news() -> None:
    assert await asyncio.wait_for(surveyed(0, 0.0, 0.0, 0.1, 1.0), 10) == Coordinate()


def test_a_coordinate_that_lies_moves_nobody_far() -> None:
    """Where the prediction is nearly zero or the lie a light year off, one step would take an honest node there."""
    here = Coordinate(0.01, 0.02, 0.005, 0.3)
    for told in (Coordinate(1e30, 0.0, 0.1, 0.01), Coordinate(0.01, 0.02, -0.005, 0.3), Coordinate(0, 0, 0.1, -0.3)):
        moved = update(here, told, 0.05)
        assert max(abs(moved.x - here.x), abs(moved.y - here.y), abs(moved.height_s - here.height_s)) < 1.0
