"""Tests that a node survives hostile messages through gRPC and below it, and frees the memory they reserved."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from itertools import islice

import pytest
import torch
from tests.support.toy_swarm import STATE, VOCAB, ToyRunner

from treeswarm.errors import Malformed
from treeswarm.keys import Identity
from treeswarm.protocol.messages import Description, NumericsClass
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import StreamKind
from treeswarm.transport.tls import Security
from treeswarm.wire.codec import decode_control_up, decode_link_up
from treeswarm_bench.benchmarks.fuzz import open_bad_connections, send_hostile_messages
from treeswarm_bench.benchmarks.hostile import hostile_first_bytes, hostile_messages
from treeswarm_client.discovery.describe import describe
from treeswarm_node.config import NodeLimits
from treeswarm_node.engine.engine import Engine
from treeswarm_node.engine.loaded_stage import LoadedStage
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.sessions.server import NodeServer

MESSAGES = 300
DESCRIPTION = Description(
    1, "test", Span(1, 3), 4, VOCAB, 4, 2048, "toy", NumericsClass("toy", "float32"), "toy", 0, 0, 0, 0
)


@contextlib.asynccontextmanager
async def toy_node(span: Span) -> AsyncIterator[tuple[str, NodeServer, GrpcTransport]]:
    """Run a whole node with a toy model behind real gRPC with TLS."""
    store = KVStore({0: KVShape(1, 1, 1)}, 4096, torch.float32, torch.device("cpu"))
    engine = Engine(ToyRunner(), NodeLimits().budget)
    served = ServedSpan(span, 4, VOCAB, 4, 2048, "toy", NumericsClass("toy", "float32"), "toy", STATE)
    transport = GrpcTransport(security=Security(Identity.ephemeral()))
    stage = LoadedStage(served, engine, store, 1.0)
    node = NodeServer(transport, NodeLimits(session_grace_s=0.2), stage=stage, state=NodeState.ONLINE)
    listener = await transport.listen("127.0.0.1:0", node.accept)
    running = [asyncio.create_task(engine.run()), asyncio.create_task(node.sweep())]
    try:
        yield listener.address, node, transport
    finally:
        await node.close()
        await listener.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await transport.close()


@pytest.mark.parametrize("span", [Span(0, 2), Span(1, 3), Span(3, 4)], ids=["head", "middle", "tail"])
async def test_node_survives_hostile_messages(span: Span) -> None:
    bugs: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: bugs.append(context))
    async with toy_node(span) as (address, node, transport):
        client = GrpcTransport(security=Security())
        description = await describe(client, address)
        toll = await send_hostile_messages(address, Security(), description, messages=MESSAGES, seed=span.start)
        assert toll.sent.total() == MESSAGES
        assert toll.unanswered == 0
        assert toll.refused["malformed"] > 0
        assert transport.refused["malformed"] > 0
        async with asyncio.timeout(20):
            while (await describe(client, address)).trunk_free != description.trunk_free:
                await asyncio.sleep(0.1)
        assert node.sessions == {}
        await client.close()
    assert bugs == []


async def test_node_survives_bytes_that_are_not_grpc(capfd: pytest.CaptureFixture[str]) -> None:
    async with toy_node(Span(0, 2)) as (address, _, _):
        await open_bad_connections(address, times=40)
        client = GrpcTransport(security=Security())
        assert (await describe(client, address)).span == Span(0, 2)
        await client.close()
    assert "Traceback" not in capfd.readouterr().err


def test_hostile_messages_are_seeded_and_partly_valid() -> None:
    first = list(islice(hostile_messages(5, DESCRIPTION), 2000))
    assert first == list(islice(hostile_messages(5, DESCRIPTION), 2000))
    assert first != list(islice(hostile_messages(6, DESCRIPTION), 2000))
    assert len({hostile.flaw for hostile in first}) == 9
    counts: dict[bool, int] = {True: 0, False: 0}  # By whether the message is valid.
    for hostile in first:
        try:
            (decode_control_up if hostile.kind is StreamKind.CONTROL else decode_link_up)(hostile.data)
            counts[True] += 1
        except Malformed:
            counts[False] += 1
    assert min(counts.values()) > 400


def test_hostile_openings_are_determined_by_the_seed() -> None:
    assert list(islice(hostile_first_bytes(1, "/x"), 50)) == list(islice(hostile_first_bytes(1, "/x"), 50))
