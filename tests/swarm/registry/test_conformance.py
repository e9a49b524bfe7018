"""Conformance suite of all registries, against real brokers and a real DHT."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from tests.support.registry_media import (
    MEDIA,
    OTHER_MODEL,
    Clock,
    DhtMedium,
    Medium,
    MemoryMedium,
    all_ended,
    until,
    until_known,
)

from treeswarm.protocol.records import NodeState
from treeswarm.registry.seam import Registry, Snapshot
from treeswarm_bench.benchmarks.parts.fake_node import FakeNode


@pytest.fixture(params=list(MEDIA))
async def medium(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Medium]:
    """Begin and end a medium, and check that no task and no process is left."""
    before = set(psutil.Process().children(recursive=True))
    medium = MEDIA[request.param]()
    try:
        await medium.begin(tmp_path)
        yield medium
    finally:
        await medium.end()
    await all_ended(before)


async def pair(medium: Medium, clock: Clock = time.time) -> tuple[Registry, Registry]:
    """Return a registry that announces, and one that reads with the given clock."""
    return await asyncio.gather(medium.member(), medium.reader(clock))


async def next_of_size(watch: AsyncIterator[Snapshot], count: int) -> Snapshot:
    async with asyncio.timeout(20):
        async for snapshot in watch:
            if len(snapshot) == count:
                return snapshot
    raise AssertionError("the watch ended")


async def test_records_are_announced_replaced_and_withdrawn(medium: Medium) -> None:
    (writer, reader), a, b = await pair(medium), FakeNode(), FakeNode()
    await writer.announce(a.record(4001))
    await writer.announce(b.record(4002))
    await until_known(reader, "127.0.0.1:4001", "127.0.0.1:4002")
    await writer.announce(a.record(4003))
    await until_known(reader, "127.0.0.1:4002", "127.0.0.1:4003")
    await writer.withdraw(a.record(4003, state=NodeState.GONE))
    await until_known(reader, "127.0.0.1:4002")
    await until_known(writer, "127.0.0.1:4002")
    late = await medium.reader()
    await until_known(late, "127.0.0.1:4002")


async def test_watch_yields_the_present_and_every_change(medium: Medium) -> None:
    (writer, reader), a, b = await pair(medium), FakeNode(), FakeNode()
    await writer.announce(a.record(4001))
    await until_known(reader, "127.0.0.1:4001")
    watch = reader.watch()
    present = await asyncio.wait_for(anext(watch), 5)
    assert [sealed.record.node for sealed in present] == [a.id]
    await writer.announce(b.record(4002))
    assert {sealed.record.node for sealed in await next_of_size(watch, 2)} == {a.id, b.id}
    await writer.withdraw(a.record(state=NodeState.GONE))
    assert [sealed.record.node for sealed in await next_of_size(watch, 1)] == [b.id]


async def test_hostile_records_are_rejected_and_counted(medium: Medium) -> None:
    (writer, reader), honest, hostile = await pair(medium), FakeNode(), FakeNode()
    old = honest.record(6666)
    await writer.announce(honest.record(4001))
    await until_known(reader, "127.0.0.1:4001")
    newer = honest.record(6666).sealed
    records: dict[str, tuple[str, bytes]] = {
        "forged": (honest.id, newer[:-1] + bytes([newer[-1] ^ 1])),
        "stale": (honest.id, old.sealed),
        "oversized": (honest.id, newer + bytes(600)),
        "malformed": (honest.id, b"no record"),
        "other-model": (hostile.id, hostile.record(6666, model=OTHER_MODEL).sealed),
        "expired": (hostile.id, hostile.record(6666, expires=int(time.time()) - 1000).sealed),
    }
    for node, sealed in records.values():
        await medium.put(node, sealed)
    if isinstance(
        medium, DhtMedium
    ):  # The DHT keeps the newer of two signed records: the older never reaches a reader.
        await medium.put_dated(old)
        await medium.put_dated(hostile.record(6666, expires=int(time.time()) - 1000))
        records.pop("stale")

    async def counted() -> bool:
        return all(reader.rejected[kind] for kind in records)

    await until(counted, f"all of {list(records)} are counted")
    await until_known(reader, "127.0.0.1:4001")
    await writer.announce(honest.record(4002))  # The hostile records do not occupy its place.
    await until_known(reader, "127.0.0.1:4002")


async def test_twenty_nodes_are_known(medium: Medium) -> None:
    (writer, reader), nodes = await pair(medium), [FakeNode() for _ in range(20)]
    await asyncio.gather(*(writer.announce(node.record(5000 + port)) for port, node in enumerate(nodes)))
    await until_known(reader, *(f"127.0.0.1:{5000 + port}" for port in range(20)))
    assert [sealed.record.node for sealed in await reader.snapshot()] == sorted(node.id for node in nodes)


async def test_record_that_is_not_renewed_expires(medium: Medium) -> None:
    later = 0.0
    (writer, reader), node = await pair(medium, lambda: time.time() + later), FakeNode()
    await writer.announce(node.record(4001))
    await until_known(reader, "127.0.0.1:4001")
    later = 250.0
    await until_known(reader, "127.0.0.1:4001")
    later = 310.0
    await until_known(reader)
    await asyncio.sleep(0.5)  # Copies in the medium do not bring it back.
    await until_known(reader)


async def test_records_survive_a_restart_of_the_medium(medium: Medium) -> None:
    if isinstance(medium, MemoryMedium):
        pytest.skip("this medium ends with the process")
    (writer, reader), node = await pair(medium), FakeNode()
    await writer.announce(node.record(4001))
    await until_known(reader, "127.0.0.1:4001")
    await medium.kill()
    await asyncio.sleep(1)
    await until_known(reader, "127.0.0.1:4001")
    await medium.restore()
    late = await medium.reader()
    await until_known(late, "127.0.0.1:4001")  # By itself: it was not announced again by the test.
    await writer.announce(node.record(4002))
    await until_known(reader, "127.0.0.1:4002")
    await until_known(late, "127.0.0.1:4002")
