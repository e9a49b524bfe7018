"""A node's network coordinate follows its pings, and no other node can move it far."""

import asyncio

import pytest

from treeswarm.protocol.messages import Pong
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.topology.coordinates import Coordinate, update
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.fake_node import FakeNode
from treeswarm_node.membership.distances import DistanceSurvey


async def coordinate_after_visit(answers: int, *announced: float) -> Coordinate:
    """Return a node's coordinate after it visited a node that announces a position, answers some pings and ends."""
    network = MemoryNetwork()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        for _ in range(answers):
            await stream.receive()
            await stream.send(Pong(0))

    listener = await network.transport().listen("127.0.0.1:0", accept)
    changes = {"address": listener.address, "pin": "", "coordinate": announced, "state": NodeState.ONLINE}
    record: NodeRecord = FakeNode().record(**changes).record
    survey = DistanceSurvey(network.transport())
    await survey.ping_some([record])
    await listener.close()
    return survey.coordinate


@pytest.mark.timeout(20)
async def test_a_node_that_ends_the_stream_changes_nothing() -> None:
    assert await asyncio.wait_for(coordinate_after_visit(0, 0.0, 0.0, 0.1, 1.0), 10) == Coordinate()


def test_a_false_coordinate_moves_a_node_only_a_little() -> None:
    """One full step would take an honest node there if the prediction is nearly zero or the false position far away."""
    here = Coordinate(0.01, 0.02, 0.005, 0.3)
    for false in (Coordinate(1e30, 0.0, 0.1, 0.01), Coordinate(0.01, 0.02, -0.005, 0.3), Coordinate(0, 0, 0.1, -0.3)):
        moved = update(here, false, 0.05)
        assert max(abs(moved.x - here.x), abs(moved.y - here.y), abs(moved.height_s - here.height_s)) < 1.0
