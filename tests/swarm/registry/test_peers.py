"""Tests of the peers registry beyond the conformance suite: which nodes it asks."""

import asyncio
import time

import pytest

from treeswarm.protocol.messages import Records, Watch
from treeswarm.protocol.spans import Span
from treeswarm.registry.peers import FIRST_ANSWER_S, LEAST_GRACE_S, SOURCES, PeersRegistry
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


def start_seconds(addresses: str, spans: dict[int, Span], *, discover: bool) -> tuple[float, int]:
    """Return the seconds until a registry of `addresses` has started, and the number of nodes it then knows.

    Ports of `spans` belong to nodes that host these blocks, port 9 to machines that accept connections and are silent,
    and no other port is open.
    """

    async def run() -> tuple[float, int]:
        network = MemoryNetwork()
        records = {port: FakeNode().record(port, span=span).sealed for port, span in spans.items()}

        async def send_records(port: int, stream: Stream) -> None:
            watch = await stream.receive()
            assert isinstance(watch, Watch)
            await stream.send(Records(tuple(records.values()) if watch.everyone else (records[port],)))
            await stream.receive()

        async def stay_silent(kind: StreamKind, stream: Stream) -> None:
            await asyncio.Event().wait()

        for port in spans:
            await network.transport().listen(f"a:{port}", lambda _, stream, port=port: send_records(port, stream))  # type: ignore[misc]
        for host in "bcde":
            await network.transport().listen(f"{host}:9", stay_silent)
        typed = tuple(addresses.split(","))
        registry = PeersRegistry(MODEL, transport=network.transport(), addresses=typed, discover=discover)
        await registry.start()
        known = len(await registry.snapshot())
        seconds = asyncio.get_running_loop().time()
        await registry.close()
        return seconds, known

    return run_virtually(run())


@pytest.mark.parametrize("addresses", ["b:9,c:9,d:9,e:9,a:4001", "a:1,b:9,c:9,d:9,e:9,a:4001", "a:4001,b:9"])
def test_dead_addresses_before_a_living_one_cost_no_time(addresses: str) -> None:
    seconds, known = start_seconds(addresses, {4001: Span(0, 4), 4002: Span(4, 8)}, discover=True)
    assert seconds < LEAST_GRACE_S
    assert known == 2


def test_a_list_starts_once_its_living_nodes_have_every_block() -> None:
    spans = {4001: Span(0, 4), 4002: Span(4, 8), 4003: Span(0, 8)}
    seconds, known = start_seconds("b:9,c:9,a:1,d:9,e:9,a:4001,a:4002,a:4003", spans, discover=False)
    assert seconds <= 2 * LEAST_GRACE_S
    assert known == 3


def test_a_list_with_a_gap_waits_for_its_silent_nodes() -> None:
    seconds, known = start_seconds("a:4001,b:9", {4001: Span(0, 4)}, discover=False)
    assert seconds >= FIRST_ANSWER_S
    assert known == 1


def test_a_node_that_returns_is_not_unanswered_although_another_took_its_place() -> None:
    async def run() -> None:
        network, nodes = MemoryNetwork(), [FakeNode() for _ in range(SOURCES + 1)]
        records = tuple(node.record(4001 + i).sealed for i, node in enumerate(nodes[:SOURCES]))
        news: list[asyncio.Queue[bytes]] = []

        async def send_records(kind: StreamKind, stream: Stream) -> None:
            news.append(asyncio.Queue())
            queue = news[-1]
            await stream.receive()
            await stream.send(Records(records))
            while True:
                await stream.send(Records((await queue.get(),)))

        ports = range(4001, 4001 + len(nodes))
        listeners = [await network.transport().listen(f"127.0.0.1:{port}", send_records) for port in ports]
        typed = ("127.0.0.1:4001",)
        registry = PeersRegistry(MODEL, transport=network.transport(), addresses=typed)
        await registry.start()
        await asyncio.sleep(10)
        before = nodes[0].record(4001).sealed
        await listeners[0].close()
        network.disconnect_host("127.0.0.1:4001")
        await asyncio.sleep(10)
        assert any(address.startswith(typed) for address in registry.unanswered)
        news[-1].put_nowait(nodes[-1].record(ports[-1]).sealed)
        await asyncio.sleep(10)
        registry.clock = lambda: time.time() + 30.0  # the record was signed half a minute ago
        news[-1].put_nowait(before)
        await asyncio.sleep(1)
        assert registry.unanswered
        registry.clock = time.time
        news[-1].put_nowait(nodes[0].record(4001).sealed)
        await asyncio.sleep(1)
        assert not registry.unanswered
        await registry.close()

    run_virtually(run())


def test_a_start_that_is_cancelled_asks_no_longer() -> None:
    async def run() -> None:
        network = MemoryNetwork()
        before = asyncio.all_tasks()
        registry = PeersRegistry(MODEL, transport=network.transport(), addresses=("a:1",))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(registry.start(), 0.0)
        starting = asyncio.create_task(registry.start())
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        assert asyncio.all_tasks() == before

    run_virtually(run())
