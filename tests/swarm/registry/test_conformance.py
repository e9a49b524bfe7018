"""One conformance suite for the registry seam, over all its forms, against their real counterparts."""

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
    InDht,
    InMemory,
    Medium,
    Node,
    all_gone,
    knows,
    until,
)

from treeswarm.protocol.records import NodeState
from treeswarm.registry.seam import Registry, Snapshot


@pytest.fixture(params=list(MEDIA))
async def medium(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Medium]:
    """Begins it, ends it, and sees that nothing is left: no task, no process."""
    before = set(psutil.Process().children(recursive=True))
    made = MEDIA[request.param]()
    try:
        await made.begin(tmp_path)
        yield made
    finally:
        await made.end()
    await all_gone(before)


async def pair(medium: Medium, clock: Clock = time.time) -> tuple[Registry, Registry]:
    """Who announces, and who reads with that clock."""
    return await asyncio.gather(medium.member(), medium.reader(clock))


async def next_with(watch: AsyncIterator[Snapshot], count: int) -> Snapshot:
    async with asyncio.timeout(20):
        async for snapshot in watch:
            if len(snapshot) == count:
                return snapshot
    raise AssertionError("the watch ended")


async def test_what_is_announced_is_seen_replaced_and_withdrawn(medium: Medium) -> None:
    (writer, reader), a, b = await pair(medium), Node(), Node()
    await writer.announce(a.record(4001))
    await writer.announce(b.record(4002))
    await knows(reader, "127.0.0.1:4001", "127.0.0.1:4002")
    await writer.announce(a.record(4003))
    await knows(reader, "127.0.0.1:4002", "127.0.0.1:4003")
    await writer.withdraw(a.record(4003, state=NodeState.GONE))
    await knows(reader, "127.0.0.1:4002")
    await knows(writer, "127.0.0.1:4002")
    late = await medium.reader()
    await knows(late, "127.0.0.1:4002")


async def test_a_watcher_sees_the_present_and_every_change(medium: Medium) -> None:
    (writer, reader), a, b = await pair(medium), Node(), Node()
    await writer.announce(a.record(4001))
    await knows(reader, "127.0.0.1:4001")
    watch = reader.watch()
    present = await asyncio.wait_for(anext(watch), 5)
    assert [sealed.record.node for sealed in present] == [a.id]
    await writer.announce(b.record(4002))
    assert {sealed.record.node for sealed in await next_with(watch, 2)} == {a.id, b.id}
    await writer.withdraw(a.record(state=NodeState.GONE))
    assert [sealed.record.node for sealed in await next_with(watch, 1)] == [b.id]


async def test_an_enemy_is_not_believed_and_does_no_harm(medium: Medium) -> None:
    (writer, reader), honest, stranger = await pair(medium), Node(), Node()
    old = honest.record(6666)
    await writer.announce(honest.record(4001))
    await knows(reader, "127.0.0.1:4001")
    newer = honest.record(6666).sealed
    put: dict[str, tuple[str, bytes]] = {
        "forged": (honest.id, newer[:-1] + bytes([newer[-1] ^ 1])),
        "stale": (honest.id, old.sealed),
        "oversized": (honest.id, newer + bytes(600)),
        "malformed": (honest.id, b"no record"),
        "other-model": (stranger.id, stranger.record(6666, model=OTHER_MODEL).sealed),
        "expired": (stranger.id, stranger.record(6666, expires=int(time.time()) - 1000).sealed),
    }
    for node, sealed in put.values():
        await medium.put(node, sealed)
    if isinstance(medium, InDht):  # the DHT keeps the newer of two that are signed; the older never gets to a reader
        await medium.put_dated(old)
        await medium.put_dated(stranger.record(6666, expires=int(time.time()) - 1000))
        put.pop("stale")

    async def counted() -> bool:
        return all(reader.rejected[kind] for kind in put)

    await until(counted, f"all of {list(put)} are counted")
    await knows(reader, "127.0.0.1:4001")
    await writer.announce(honest.record(4002))  # and nobody keeps its place taken
    await knows(reader, "127.0.0.1:4002")


async def test_twenty_nodes_are_known(medium: Medium) -> None:
    (writer, reader), nodes = await pair(medium), [Node() for _ in range(20)]
    await asyncio.gather(*(writer.announce(node.record(5000 + port)) for port, node in enumerate(nodes)))
    await knows(reader, *(f"127.0.0.1:{5000 + port}" for port in range(20)))
    assert [sealed.record.node for sealed in await reader.snapshot()] == sorted(node.id for node in nodes)


async def test_what_is_not_announced_again_is_forgotten(medium: Medium) -> None:
    later = 0.0
    (writer, reader), node = await pair(medium, lambda: time.time() + later), Node()
    await writer.announce(node.record(4001))
    await knows(reader, "127.0.0.1:4001")
    later = 250.0
    await knows(reader, "127.0.0.1:4001")
    later = 310.0
    await knows(reader)
    await asyncio.sleep(0.5)  # what still lies in the medium does not bring it back
    await knows(reader)


async def test_the_medium_dies_and_comes_back(medium: Medium) -> None:
    if isinstance(medium, InMemory):
        pytest.skip("dies with the process")
    (writer, reader), node = await pair(medium), Node()
    await writer.announce(node.record(4001))
    await knows(reader, "127.0.0.1:4001")
    await medium.kill()
    await asyncio.sleep(1)
    await knows(reader, "127.0.0.1:4001")
    await medium.restore()
    late = await medium.reader()
    await knows(late, "127.0.0.1:4001")  # by itself: nobody announced it since
    await writer.announce(node.record(4002))
    await knows(reader, "127.0.0.1:4002")
    await knows(late, "127.0.0.1:4002")
