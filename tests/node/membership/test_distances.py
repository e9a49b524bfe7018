"""A node's network coordinate follows its pings, and no other node can move it far."""

import asyncio

import pytest

from treeswarm.protocol.messages import Ping, Pong
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.topology.coordinates import Coordinate, update
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.fake_node import FakeNode
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.membership.distances import FIRST_SURVEYS_S, SETTLED, SURVEY_EVERY_S, DistanceSurvey


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


def test_new_coordinates_settle_within_a_minute_and_then_rest() -> None:
    """Three new nodes, 20 ms from one another; each announces its coordinate when it has become more precise."""

    async def run() -> tuple[float, list[DistanceSurvey]]:
        network, loop = MemoryNetwork(), asyncio.get_running_loop()
        shape = LinkShape(0.01)

        async def accept(kind: StreamKind, stream: Stream) -> None:
            while isinstance(ping := await stream.receive(), Ping):
                await stream.send(Pong(ping.stamp))

        surveys, records = [], {}
        for _ in range(3):
            transport = EmulatedTransport(network.transport(), shape)
            address = (await transport.listen("127.0.0.1:0", accept)).address
            survey = DistanceSurvey(transport)
            node = FakeNode()

            def announce(survey: DistanceSurvey = survey, address: str = address, node: FakeNode = node) -> None:
                changes = {"coordinate": survey.coordinate_values(), "state": NodeState.ONLINE}
                records[address] = node.record(address=address, pin="", **changes).record

            survey.on_settling = announce
            announce()
            surveys.append(survey)

            async def others(own: str = address) -> list[NodeRecord]:
                return [record for address, record in records.items() if address != own]

            loop.create_task(survey.run(others)).set_name("survey")
        while any(record.position is None or record.position.error > 0.5 for record in records.values()):
            await asyncio.sleep(1.0)
            assert loop.time() < 600.0
        settled_s = loop.time()
        await asyncio.sleep(300.0)
        for task in asyncio.all_tasks():
            if task.get_name() == "survey":
                task.cancel()
        return settled_s, surveys

    settled_s, surveys = run_virtually(run())
    assert settled_s < 60.0
    assert all(survey.coordinate.error <= SETTLED and survey.pause_s == SURVEY_EVERY_S for survey in surveys)
    assert DistanceSurvey(MemoryNetwork().transport()).pause_s == FIRST_SURVEYS_S
