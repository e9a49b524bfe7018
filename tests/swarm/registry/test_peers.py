"""Tests of the peers registry beyond the conformance suite: which nodes it asks."""

import asyncio
import time

import pytest

from treeswarm.protocol.messages import Records, Watch
from treeswarm.registry.peers import SOURCES, PeersRegistry
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_bench.virtual_clock import run_virtually


def test_known_nodes_replace_all_typed_addresses_that_are_gone() -> None:
    """This holds for any number of typed addresses: dead ones must not be asked again and again instead."""

    async def run() -> None:
        network, nodes = MemoryNetwork(), [FakeNode() for _ in range(12)]
        records = [node.record(4001 + i).sealed for i, node in enumerate(nodes)]
        asked: set[int] = set()

        async def send_records(number: int, stream: Stream) -> None:
            assert isinstance(await stream.receive(), Watch)
            asked.add(number)
            await stream.send(Records(tuple(records)))
            await asyncio.Event().wait()

        listeners = [
            await network.transport().listen(f"127.0.0.1:{4001 + i}", lambda _, stream, i=i: send_records(i, stream))  # type: ignore[misc]
            for i in range(12)
        ]
        typed = tuple(f"127.0.0.1:{4001 + i}" for i in range(6))
        registry = PeersRegistry(MODEL, transport=network.transport(), addresses=typed)
        await registry.start()
        assert len(await registry.snapshot()) == 12
        for listener in listeners[:6]:
            await listener.close()
        await asyncio.sleep(60)
        later = asked - set(range(6))
        assert SOURCES <= len(later) <= 6
        newcomer = FakeNode()
        records.append(newcomer.record(5000).sealed)
        for listener in listeners[6:]:
            await listener.close()
        await network.transport().listen("127.0.0.1:4012", lambda _, stream: send_records(99, stream))
        await asyncio.sleep(60)
        assert len(await registry.snapshot()) == 13
        await registry.close()

    run_virtually(run())


@pytest.mark.parametrize("typed", [1, 3])
def test_known_nodes_replace_typed_addresses_when_most_are_gone(typed: int) -> None:
    """This holds for any number of typed addresses, and when some of the known nodes are gone as well."""

    async def run() -> None:
        network = MemoryNetwork()
        records: list[bytes] = []
        asked: list[str] = []

        async def send_records(kind: StreamKind, stream: Stream) -> None:
            await stream.receive()
            asked.append(stream.host)  # type: ignore[attr-defined]
            await stream.send(Records(tuple(records)))
            await stream.receive()

        listeners = [await network.transport().listen("127.0.0.1:0", send_records) for _ in range(typed + 8)]
        ports = [int(listener.address.rpartition(":")[2]) for listener in listeners]
        records += [FakeNode().record(port, pin="").sealed for port in ports[typed:]]
        addresses = tuple(listener.address for listener in listeners[:typed])
        registry = PeersRegistry(MODEL, time.time, transport=network.transport(), addresses=addresses, discover=True)
        await registry.start()
        for listener in listeners[:-1]:
            await listener.close()
            network.disconnect_host(listener.address)
        asked.clear()
        await asyncio.sleep(60)
        assert listeners[-1].address in asked
        await registry.close()

    run_virtually(run())
