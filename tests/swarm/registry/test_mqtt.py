"""Tests of the MQTT registry beyond the conformance suite: cleared topics, last wills and refusing brokers."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.registry_media import BrokerMedium, all_ended, free_port, until, until_known

from treeswarm.errors import BadRequest, TransportError, Unreachable
from treeswarm.registry import book, client_registry, mqtt, open_registry
from treeswarm.registry.mqtt import MqttRegistry
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode


@pytest.fixture(params=["amqtt", "mosquitto"])
async def open_broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BrokerMedium]:
    async for medium in running_broker(request.param, tmp_path):
        yield medium


@pytest.fixture
async def tls_broker(tmp_path: Path) -> AsyncIterator[BrokerMedium]:
    """A broker with TLS and users, of whom `bob` may only read."""
    async for medium in running_broker("mosquitto tls", tmp_path):
        yield medium


async def running_broker(kind: str, folder: Path) -> AsyncIterator[BrokerMedium]:
    medium = BrokerMedium(kind)
    try:
        await medium.begin(folder)
        yield medium
    finally:
        await medium.end()
    await all_ended(set())


async def test_cleared_or_overwritten_record_is_published_again(
    open_broker: BrokerMedium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "REPUBLISH_S", 0.1)
    writer, reader, node = await open_broker.join(), await open_broker.join(), FakeNode()
    await writer.announce(node.record(4001))
    for rubbish in (b"", b"rubbish"):
        await open_broker.put(node.id, rubbish)
        await asyncio.sleep(0.5)
        await until_known(reader, "127.0.0.1:4001")
        await until_known(await open_broker.join(), "127.0.0.1:4001")


async def test_vanished_node_leaves_a_hint_and_stays_known(open_broker: BrokerMedium) -> None:
    node = FakeNode()
    writer, reader = await open_broker.join(node.id), await open_broker.join()
    await writer.announce(node.record(4001))
    await until_known(reader, "127.0.0.1:4001")
    assert writer._connection.client is not None
    sock = writer._connection.client._client.socket()
    assert sock is not None
    sock.shutdown(2)  # type: ignore[union-attr]
    assert await asyncio.wait_for(reader.hints.get(), 20) == node.id
    await until_known(reader, "127.0.0.1:4001")


async def test_hints_about_unknown_nodes_and_excess_hints_are_dropped(open_broker: BrokerMedium) -> None:
    node, reader = FakeNode(), await open_broker.join()
    await reader.announce(node.record(4001))
    assert reader._connection.client is not None
    for lost in ("0" * 32, "nonsense", *[node.id] * (book.MAX_HINTS + 5)):
        await reader._connection.client.publish(f"swarms/test/{MODEL}/lost/{lost}", b"")

    async def full() -> bool:
        return reader.hints.full()

    await until(full, "the hints have arrived")
    assert {reader.hints.get_nowait() for _ in range(book.MAX_HINTS)} == {node.id}


async def test_record_announced_without_broker_is_announced_later(open_broker: BrokerMedium) -> None:
    writer, node = await open_broker.join(), FakeNode()
    await open_broker.kill()
    await asyncio.sleep(0.3)
    with pytest.raises(Unreachable, match="as soon as it is back"):
        await writer.announce(node.record(4001))
    await open_broker.restore()
    await until_known(await open_broker.join(), "127.0.0.1:4001")


async def test_client_without_a_model_reads_all_records(open_broker: BrokerMedium) -> None:
    writer, node = await open_broker.join(), FakeNode()
    await writer.announce(node.record(4001))
    reader = await client_registry(str(open_broker.broker), None, MemoryNetwork().transport())
    assert [sealed.record.node for sealed in await reader.snapshot()] == [node.id]
    await reader.close()


async def test_refusal_by_the_broker_is_reported_at_once(tls_broker: BrokerMedium) -> None:
    for changes, error, message in (
        ({"password": "wrong"}, BadRequest, "refuses user 'alice': check"),
        ({"user": None, "password": None}, BadRequest, "refuses anonymous users"),
        ({"ca": None}, BadRequest, r"not trusted \(.*\).*\?ca="),
        ({"host": "localhost"}, BadRequest, "not trusted .*check the host's name"),
        ({"port": free_port()}, Unreachable, "no broker answers at 127.0.0.1:"),
    ):
        with pytest.raises(error, match=message):
            await MqttRegistry.start(replace(tls_broker.broker, **changes), MODEL)  # type: ignore[arg-type]


async def test_plaintext_to_a_tls_port_is_reported(tls_broker: BrokerMedium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "ANSWER_S", 1.0)
    with pytest.raises(Unreachable, match="if that is a TLS port, write mqtts://"):
        await MqttRegistry.start(replace(tls_broker.broker, tls=False, ca=None), MODEL)


async def test_tls_to_a_plaintext_port_is_reported(open_broker: BrokerMedium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "ANSWER_S", 1.0)
    with pytest.raises((BadRequest, Unreachable), match=r"does not speak TLS|no broker answers"):
        await open_registry(f"mqtts://127.0.0.1:{open_broker.port}/swarms/test", MODEL, FakeNode().id)


async def test_user_without_write_permission_is_reported(
    tls_broker: BrokerMedium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "ANSWER_S", 1.0)
    tls_broker.broker = replace(tls_broker.broker, user="bob", password="battery staple")
    bob = await tls_broker.join()
    with pytest.raises(TransportError, match=r"does not pass it on: let user bob read and write swarms/test/#"):
        await bob.announce(FakeNode().record())


@pytest.mark.slow
async def test_silent_broker_is_left_and_reconnected(tls_broker: BrokerMedium) -> None:
    writer, node = await tls_broker.join(), FakeNode()
    assert tls_broker.process is not None
    os.kill(tls_broker.process.pid, signal.SIGSTOP)

    async def disconnected() -> bool:
        return writer._connection.client is None

    await until(disconnected, "the silence is detected", timeout=3 * mqtt.KEEPALIVE_S)
    os.kill(tls_broker.process.pid, signal.SIGCONT)

    async def connected() -> bool:
        return not await disconnected()

    await until(connected, "it is connected again")
    await writer.announce(node.record(4001))
