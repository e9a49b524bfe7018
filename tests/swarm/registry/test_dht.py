"""Tests of the DHT registry beyond the conformance suite: failing daemons, hostile peers, missing hivemind."""

import asyncio
import contextlib
import gc
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.registry_media import LOOPBACK, DhtMedium, all_ended, kill_daemon, until, until_known

from treeswarm.errors import BadRequest, DamagedFile, TransportError, Unreachable
from treeswarm.protocol.records import LIFETIME_S, NodeState, SealedRecord
from treeswarm.registry import open_registry
from treeswarm.registry.dht import DhtRegistry
from treeswarm.registry.dht_peer import DIAL_S, DhtPeer, check_hivemind, shard_key
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode


@pytest.fixture
async def dht(tmp_path: Path) -> AsyncIterator[DhtMedium]:
    medium = DhtMedium()
    try:
        await medium.begin(tmp_path)
        yield medium
    finally:
        await medium.end()
    await all_ended(set())


async def member(dht: DhtMedium) -> DhtRegistry:
    registry = await dht.member()
    assert isinstance(registry, DhtRegistry)
    return registry


async def test_dead_daemon_is_replaced_at_the_same_address(dht: DhtMedium, caplog: pytest.LogCaptureFixture) -> None:
    writer, reader, node = await member(dht), await member(dht), FakeNode()
    await writer.announce(node.record(4001))
    await until_known(reader, "127.0.0.1:4001")
    spec, address = writer.spec, writer.visible_maddrs
    kill_daemon(writer)
    await writer.announce(node.record(4002))
    await until_known(reader, "127.0.0.1:4002")
    kill_daemon(reader)
    await writer.announce(node.record(4003))
    await until_known(reader, "127.0.0.1:4003")
    assert (writer.spec, writer.visible_maddrs) == (spec, address)
    assert "a bug" not in caplog.text, "a daemon or a peer that is gone is no bug"
    assert "Traceback" not in caplog.text
    assert re.fullmatch(r"dht:/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+", spec)


async def test_peer_closes_before_a_call_has_begun(dht: DhtMedium) -> None:
    """A coroutine that is never awaited is a warning at some later time, and warnings are errors in tests."""
    peer = (await member(dht)).daemon.peer
    work = peer.connected(), peer.maddrs(), peer.read(["shard"], lambda _: None)
    calls = [asyncio.create_task(call) for call in work]
    await asyncio.sleep(0)  # Each has started its task, and none of these has taken its first step.
    await peer._calls.close()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 3
    gc.collect()


async def test_only_a_registry_without_key_file_makes_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node has a key file: one that is killed leaves nothing behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with_file = await DhtRegistry.start(MODEL, (), LOOPBACK, tmp_path / "identity")
    assert count_temporary(tmp_path) == 0
    without_file = await DhtRegistry.start(MODEL, with_file.visible_maddrs, LOOPBACK)
    assert count_temporary(tmp_path) == 1
    await without_file.close()
    await with_file.close()
    assert count_temporary(tmp_path) == 0


def count_temporary(folder: Path) -> int:
    return len(list(folder.glob("treeswarm-dht-*")))


async def test_daemon_is_kept_where_peers_refuse_a_record(dht: DhtMedium) -> None:
    """The clock of this node is an hour ahead of theirs, for example."""
    writer, node = await member(dht), FakeNode()
    peer, signed = writer.daemon.current, int(time.time()) + 3600
    with pytest.raises(Unreachable, match="although peers answer: compare this machine's clock"):
        await writer.announce(node.record(4001, generation=signed * 1_000_000, expires=signed + LIFETIME_S))
    assert writer.daemon.current is peer


async def test_ctrl_c_on_the_terminal_does_not_reach_the_daemon(dht: DhtMedium) -> None:
    writer = await member(dht)
    assert writer.daemon.current is not None
    daemon = psutil.Process(writer.daemon.current.p2p._child.pid)
    assert "p2pd" in daemon.name()
    assert os.getpgid(daemon.pid) == daemon.pid != os.getpgid(0)


async def test_replaced_daemon_announces_its_records_again(dht: DhtMedium) -> None:
    writer, node = await member(dht), FakeNode()
    assert dht.first is not None
    await writer.announce(node.record(4001))
    kill_daemon(dht.first)
    kill_daemon(writer)  # With both, every copy of the record is lost.
    await until(lambda: alive(dht.first, writer), "both are replaced")
    await until_known(await member(dht), "127.0.0.1:4001")


async def test_peer_that_is_dialled_after_a_restart_announces_again(dht: DhtMedium) -> None:
    writer, node = await member(dht), FakeNode()
    await writer.announce(node.record(4001))
    await dht.kill()  # It does not come back by itself.
    failed = writer.daemon.current
    kill_daemon(writer)
    await until(lambda: has_new_daemon(writer, failed), "the writer has a new daemon")
    assert dht.first is not None
    await dht.first.daemon.start()
    assert await dht.first.daemon.peer.connect(writer.visible_maddrs)
    await until_known(await member(dht), "127.0.0.1:4001")


async def has_new_daemon(registry: DhtRegistry, failed: DhtPeer | None) -> bool:
    return registry.daemon.current not in (None, failed)


async def alive(*registries: DhtRegistry | None) -> bool:
    with contextlib.suppress(TransportError):
        return all([registry is not None and await registry.daemon.peer.connected() for registry in registries])
    return False


async def test_daemon_that_does_not_respond_is_replaced(dht: DhtMedium) -> None:
    writer, reader, node = await member(dht), await member(dht), FakeNode()
    assert writer.daemon.current is not None
    broken = writer.daemon.current
    broken.p2p._client.control._write_task.cancel()  # As after a value that is too large.
    await writer.announce(node.record(4001))
    assert writer.daemon.current is not broken
    await until_known(reader, "127.0.0.1:4001")


async def test_records_of_a_lone_node_reach_a_later_peer(dht: DhtMedium) -> None:
    node = FakeNode()
    assert dht.first is not None
    await dht.first.announce(node.record(4001))
    await until_known(await member(dht), "127.0.0.1:4001")


async def test_record_announced_without_peers_is_announced_later(dht: DhtMedium) -> None:
    writer, node = await member(dht), FakeNode()
    await dht.kill()
    with pytest.raises(Unreachable, match=r"none of /ip4/127.0.0.1/tcp/.* answers"):
        await writer.announce(node.record(4001))
    await dht.restore()
    assert dht.first is not None
    await until_known(dht.first, "127.0.0.1:4001")


async def test_record_that_is_too_large_is_refused(dht: DhtMedium) -> None:
    assert dht.first is not None
    record = FakeNode().record()
    with pytest.raises(BadRequest, match="700 bytes, at most 600"):
        await dht.first.announce(SealedRecord(record.record, bytes(700)))
    await dht.first.announce(record)


async def test_hostile_dictionary_around_entries_does_no_harm(dht: DhtMedium) -> None:
    """hivemind validates entries, but trusts the size and expiry of the dictionary around them."""
    writer, reader, node = await member(dht), await member(dht), FakeNode()
    await writer.announce(node.record(4001))
    await dht.put(node.id, b"")
    assert dht.attacker is not None
    protocol: Any = dht.attacker[1].protocol
    find, answers = protocol.rpc_find, []

    async def lie(request: Any, context: Any) -> Any:
        from hivemind.dht.storage import DictionaryDHTValue
        from hivemind.utils import MSGPackSerializer

        response = await find(request, context)
        for result in response.results:
            empty = DictionaryDHTValue()
            empty.maxsize = "many" if len(answers) % 2 else 1  # type: ignore[assignment]
            result.type, result.value = 2, MSGPackSerializer.dumps(empty)
            result.expiration_time = float("inf") if len(answers) % 3 else time.time() + 60
            answers.append(empty)
        return response

    handlers = dht.attacker[0]._client.control.unary_handlers
    name = next(name for name in handlers if name.endswith("rpc_find"))

    async def handle(data: bytes, peer: Any) -> bytes:
        from hivemind.p2p import P2PContext
        from hivemind.proto import dht_pb2

        response: bytes = (
            await lie(dht_pb2.FindRequest.FromString(data), P2PContext(name, peer, peer))
        ).SerializeToString()
        return response

    handlers[name] = handle
    await until(lambda: has_length(answers, 64), "the attacker is asked")
    await writer.announce(node.record(4002))
    await until_known(reader, "127.0.0.1:4002")


async def has_length(items: list[Any], least: int) -> bool:
    return len(items) >= least


async def test_announcing_an_older_record_keeps_the_daemon(dht: DhtMedium) -> None:
    writer, reader, node = await member(dht), await member(dht), FakeNode()
    older, newer = node.record(4001), node.record(4002)
    await writer.announce(newer)
    before = writer.daemon.current
    await writer.announce(older)
    assert writer.daemon.current is before
    await until_known(reader, "127.0.0.1:4002")


async def test_withdrawal_persists_after_its_node_is_closed(dht: DhtMedium) -> None:
    writer, node = await member(dht), FakeNode()
    await writer.announce(node.record(4001))
    await writer.withdraw(node.record(state=NodeState.GONE))
    await writer.close()
    late = await member(dht)
    await asyncio.sleep(1)
    assert await late.snapshot() == ()


async def test_joining_a_missing_swarm_is_unreachable() -> None:
    missing = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
    with pytest.raises(Unreachable, match=r"no DHT answers at /ip4/127.0.0.1/tcp/9.*begin a new swarm"):
        await open_registry(f"dht:{missing}", MODEL, FakeNode().id, LOOPBACK)
    await all_ended(set())


async def test_missing_hivemind_is_reported_with_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hivemind.utils.logging", None)
    with pytest.raises(BadRequest, match=r"pip install .*\[dht\].*Windows.*MQTT"):
        await open_registry("dht:", MODEL, FakeNode().id)


def test_hivemind_does_not_rename_log_levels() -> None:
    check_hivemind()
    assert logging.getLevelName(logging.WARNING) == "WARNING"


def test_model_has_sixteen_keys() -> None:
    keys = {shard_key(MODEL, FakeNode().id) for _ in range(300)}
    assert len(keys) == 16
    assert f"treeswarm/1/{MODEL}/7" in keys


async def test_first_peer_comes_back_to_the_swarm_that_it_remembers(dht: DhtMedium) -> None:
    """It was started without peers, and is started so again: a new swarm beside the old one would divide it."""
    assert dht.first is not None
    writer, node = await member(dht), FakeNode()
    await writer.announce(node.record(4001))
    await until(lambda: has_known_peers(dht.first), "the first peer knows the other")
    spec, remembered = dht.first.spec, dht.first.known_peers()
    await dht.kill()
    dht.first = await DhtRegistry.start(
        MODEL, (), dht.listen, dht.folder / "identity", poll_s=0.3, remembered=remembered
    )
    assert dht.first.spec == spec
    assert [sealed.record.address for sealed in await dht.first.snapshot()] == ["127.0.0.1:4001"]


async def has_known_peers(registry: DhtRegistry | None) -> bool:
    return registry is not None and bool(registry.known_peers())


async def test_peer_joins_through_remembered_ones_when_the_named_one_is_gone(
    dht: DhtMedium, caplog: pytest.LogCaptureFixture
) -> None:
    writer, node = await member(dht), FakeNode()
    await writer.announce(node.record(4001))
    assert dht.first is not None
    named, silent = dht.first.visible_maddrs, f"/ip4/127.0.0.1/tcp/9/p2p/{dht.first.spec.rpartition('/')[2]}"
    await dht.kill()
    joined = await DhtRegistry.start(MODEL, named, LOOPBACK, remembered=(silent, *writer.visible_maddrs))
    dht.joined.append(joined)
    assert [sealed.record.address for sealed in await joined.snapshot()] == ["127.0.0.1:4001"]
    assert "joined through peers of this node's last run" in caplog.text


@pytest.mark.parametrize("damaged", [b"", b"\x08\x01", b"\xff" * 68])
async def test_damaged_key_of_the_daemon_is_named(damaged: bytes, tmp_path: Path) -> None:
    key = tmp_path / "node.dht"
    key.write_bytes(damaged)
    with pytest.raises(DamagedFile, match=rf"DHT peer {key} is damaged: restore it .*or delete it"):
        await DhtRegistry.start(MODEL, (), LOOPBACK, key)


async def test_black_holes_do_not_delay_joining(dht: DhtMedium) -> None:
    """Peers that accept connections and stay silent: without a race each of them costs DIAL_S."""
    assert dht.first is not None
    name = dht.first.spec.rpartition("/")[2]
    with socket.create_server(("127.0.0.1", 0)) as hole:
        silent = [f"/ip4/127.0.0.1/tcp/{hole.getsockname()[1]}/p2p/{name[:-i]}{'A' * i}" for i in range(1, 5)]
        async with asyncio.timeout(DIAL_S):
            joined = await DhtRegistry.start(MODEL, (*silent, *dht.first.visible_maddrs), LOOPBACK)
        dht.joined.append(joined)
