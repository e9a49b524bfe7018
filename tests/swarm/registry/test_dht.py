"""What is the DHT's alone: its daemon's lives, its place-keepers, what is said of a machine without it."""

import asyncio
import contextlib
import logging
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.registry_media import LOOPBACK, MODEL, InDht, Node, all_gone, kill_daemon, knows, until

from treeswarm.errors import BadRequest, TransportError, Unreachable
from treeswarm.protocol.records import NodeState, SealedRecord
from treeswarm.registry import open_registry
from treeswarm.registry.dht import DhtRegistry
from treeswarm.registry.dht_peer import DhtPeer, check_hivemind, shard_key


@pytest.fixture
async def dht(tmp_path: Path) -> AsyncIterator[InDht]:
    made = InDht()
    try:
        await made.begin(tmp_path)
        yield made
    finally:
        await made.end()
    await all_gone(set())


async def member(dht: InDht) -> DhtRegistry:
    made = await dht.member()
    assert isinstance(made, DhtRegistry)
    return made


async def test_a_dead_daemon_is_replaced_under_the_same_address(dht: InDht) -> None:
    writer, reader, node = await member(dht), await member(dht), Node()
    await writer.announce(node.record(4001))
    await knows(reader, "127.0.0.1:4001")
    spec, address = writer.spec, writer.visible_maddrs
    kill_daemon(writer)
    await writer.announce(node.record(4002))
    await knows(reader, "127.0.0.1:4002")
    kill_daemon(reader)
    await writer.announce(node.record(4003))
    await knows(reader, "127.0.0.1:4003")
    assert (writer.spec, writer.visible_maddrs) == (spec, address)
    assert re.fullmatch(r"dht:/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+", spec)


async def test_a_daemon_that_died_while_nothing_was_announced_is_replaced_and_announces_again(dht: InDht) -> None:
    writer, node = await member(dht), Node()
    assert dht.first is not None
    await writer.announce(node.record(4001))
    kill_daemon(dht.first)
    kill_daemon(writer)  # with them, every copy of the record is gone
    await until(lambda: alive(dht.first, writer), "both are back")
    await knows(await member(dht), "127.0.0.1:4001")


async def test_whoever_is_found_again_before_he_finds_anyone_announces_again_too(dht: InDht) -> None:
    writer, node = await member(dht), Node()
    await writer.announce(node.record(4001))
    await dht.kill()  # and does not come back by itself
    failed = writer.daemon.current
    kill_daemon(writer)
    await until(lambda: another_life(writer, failed), "the writer is back")
    assert dht.first is not None
    await dht.first.daemon.start()
    assert await dht.first.daemon.peer.meet(writer.visible_maddrs)
    await knows(await member(dht), "127.0.0.1:4001")


async def another_life(registry: DhtRegistry, failed: DhtPeer | None) -> bool:
    return registry.daemon.current not in (None, failed)


async def alive(*registries: DhtRegistry | None) -> bool:
    with contextlib.suppress(TransportError):
        return all([made is not None and await made.daemon.peer.connected() for made in registries])
    return False


async def test_a_connection_that_lets_nothing_through_is_noticed(dht: InDht) -> None:
    writer, reader, node = await member(dht), await member(dht), Node()
    assert writer.daemon.current is not None
    broken = writer.daemon.current
    broken.p2p._client.control._write_task.cancel()  # as after a value too large: the daemon lives, and hears nothing
    await writer.announce(node.record(4001))
    assert writer.daemon.current is not broken
    await knows(reader, "127.0.0.1:4001")


async def test_a_lone_node_announces_to_itself_and_whoever_comes_later_knows(dht: InDht) -> None:
    node = Node()
    assert dht.first is not None
    await dht.first.announce(node.record(4001))
    await knows(await member(dht), "127.0.0.1:4001")


async def test_announcing_while_nobody_is_there_says_so_and_happens_later(dht: InDht) -> None:
    writer, node = await member(dht), Node()
    await dht.kill()
    with pytest.raises(Unreachable, match=r"none of /ip4/127.0.0.1/tcp/.* answers"):
        await writer.announce(node.record(4001))
    await dht.restore()
    assert dht.first is not None
    await knows(dht.first, "127.0.0.1:4001")


async def test_what_comes_too_large_is_refused_before_it_is_stored(dht: InDht) -> None:
    assert dht.first is not None
    record = Node().record()
    with pytest.raises(BadRequest, match="700 bytes, at most 600"):
        await dht.first.announce(SealedRecord(record.record, bytes(700)))
    await dht.first.announce(record)


async def test_what_an_enemy_puts_around_the_entries_does_no_harm(dht: InDht) -> None:
    """hivemind validates entries; their dictionary's size and date are the peer's word."""
    writer, reader, node = await member(dht), await member(dht), Node()
    await writer.announce(node.record(4001))
    await dht.put(node.id, b"")
    assert dht.enemy is not None
    protocol: Any = dht.enemy[1].protocol
    find, asked = protocol.rpc_find, []

    async def lie(request: Any, context: Any) -> Any:
        from hivemind.dht.storage import DictionaryDHTValue
        from hivemind.utils import MSGPackSerializer

        response = await find(request, context)
        for result in response.results:
            nothing = DictionaryDHTValue()
            nothing.maxsize = "many" if len(asked) % 2 else 1  # type: ignore[assignment]
            result.type, result.value = 2, MSGPackSerializer.dumps(nothing)
            result.expiration_time = float("inf") if len(asked) % 3 else time.time() + 60
            asked.append(nothing)
        return response

    handlers = dht.enemy[0]._client.control.unary_handlers
    name = next(name for name in handlers if name.endswith("rpc_find"))

    async def handle(data: bytes, peer: Any) -> bytes:
        from hivemind.p2p import P2PContext
        from hivemind.proto import dht_pb2

        answer: bytes = (
            await lie(dht_pb2.FindRequest.FromString(data), P2PContext(name, peer, peer))
        ).SerializeToString()
        return answer

    handlers[name] = handle
    await until(lambda: counted(asked, 64), "the enemy is asked")
    await writer.announce(node.record(4002))
    await knows(reader, "127.0.0.1:4002")


async def counted(many: list[Any], enough: int) -> bool:
    return len(many) >= enough


async def test_an_older_record_announced_late_is_no_reason_for_another_daemon(dht: InDht) -> None:
    writer, reader, node = await member(dht), await member(dht), Node()
    older, newer = node.record(4001), node.record(4002)
    await writer.announce(newer)
    before = writer.daemon.current
    await writer.announce(older)
    assert writer.daemon.current is before
    await knows(reader, "127.0.0.1:4002")


async def test_a_withdrawal_outlives_its_node(dht: InDht) -> None:
    writer, node = await member(dht), Node()
    await writer.announce(node.record(4001))
    await writer.withdraw(node.record(state=NodeState.GONE))
    await writer.close()
    late = await member(dht)
    await asyncio.sleep(1)
    assert await late.snapshot() == ()


async def test_joining_a_swarm_that_is_not_there_says_so() -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
    with pytest.raises(Unreachable, match=r"no DHT answers at /ip4/127.0.0.1/tcp/9.*begin a new swarm"):
        await open_registry(f"dht:{nobody}", MODEL, Node().id, LOOPBACK)
    await all_gone(set())


async def test_a_machine_without_hivemind_is_told_what_it_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hivemind.utils.logging", None)
    with pytest.raises(BadRequest, match=r"pip install 'treeswarm\[dht\]'.*Windows.*MQTT"):
        await open_registry("dht:", MODEL, Node().id)


def test_hivemind_renames_no_levels_of_our_logs() -> None:
    check_hivemind()
    assert logging.getLevelName(logging.WARNING) == "WARNING"


def test_a_model_has_sixteen_keys() -> None:
    keys = {shard_key(MODEL, Node().id) for _ in range(300)}
    assert len(keys) == 16
    assert f"treeswarm/1/{MODEL}/7" in keys
