"""What is MQTT's alone: topics that anyone clears, last wills, brokers that say no."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.registry_media import MODEL, AtBroker, Node, all_gone, free_port, knows, until

from treeswarm.errors import BadRequest, TransportError, Unreachable
from treeswarm.registry import client_registry, mqtt, open_registry
from treeswarm.registry.mqtt import MqttRegistry
from treeswarm.transport.memory import MemoryNetwork


@pytest.fixture(params=["amqtt", "mosquitto"])
async def open_to_all(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AtBroker]:
    async for made in begun(request.param, tmp_path):
        yield made


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[AtBroker]:
    """TLS, users, and `bob` may only read."""
    async for made in begun("mosquitto tls", tmp_path):
        yield made


async def begun(kind: str, folder: Path) -> AsyncIterator[AtBroker]:
    made = AtBroker(kind)
    try:
        await made.begin(folder)
        yield made
    finally:
        await made.end()
    await all_gone(set())


async def test_a_record_that_anyone_clears_or_overwrites_is_not_forgotten_and_comes_back(
    open_to_all: AtBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "MEND_S", 0.1)
    writer, reader, node = await open_to_all.join(), await open_to_all.join(), Node()
    await writer.announce(node.record(4001))
    for rubbish in (b"", b"rubbish"):
        await open_to_all.put(node.id, rubbish)
        await asyncio.sleep(0.5)
        await knows(reader, "127.0.0.1:4001")
        await knows(await open_to_all.join(), "127.0.0.1:4001")


async def test_a_node_that_vanishes_leaves_a_hint_and_stays_known(open_to_all: AtBroker) -> None:
    node = Node()
    writer, reader = await open_to_all.join(node.id), await open_to_all.join()
    await writer.announce(node.record(4001))
    await knows(reader, "127.0.0.1:4001")
    assert writer._connection.client is not None
    sock = writer._connection.client._client.socket()
    assert sock is not None
    sock.shutdown(2)  # type: ignore[union-attr]
    assert await asyncio.wait_for(reader.hints.get(), 20) == node.id
    await knows(reader, "127.0.0.1:4001")


async def test_hints_about_strangers_and_floods_of_them_are_dropped(open_to_all: AtBroker) -> None:
    node, reader = Node(), await open_to_all.join()
    await reader.announce(node.record(4001))
    assert reader._connection.client is not None
    for lost in ("0" * 32, "nonsense", *[node.id] * (mqtt.MAX_HINTS + 5)):
        await reader._connection.client.publish(f"swarms/test/{MODEL}/lost/{lost}", b"")

    async def full() -> bool:
        return reader.hints.full()

    await until(full, "the hints are in")
    assert {reader.hints.get_nowait() for _ in range(mqtt.MAX_HINTS)} == {node.id}


async def test_announcing_while_the_broker_is_away_says_so_and_happens_later(open_to_all: AtBroker) -> None:
    writer, node = await open_to_all.join(), Node()
    await open_to_all.kill()
    await asyncio.sleep(0.3)
    with pytest.raises(Unreachable, match="as soon as it is back"):
        await writer.announce(node.record(4001))
    await open_to_all.restore()
    await knows(await open_to_all.join(), "127.0.0.1:4001")


async def test_a_client_reads_a_broker_by_itself_whatever_the_model(open_to_all: AtBroker) -> None:
    writer, node = await open_to_all.join(), Node()
    await writer.announce(node.record(4001))
    reader = await client_registry(str(open_to_all.broker), None, MemoryNetwork().transport())
    assert [sealed.record.node for sealed in await reader.snapshot()] == [node.id]
    await reader.close()


async def test_a_broker_that_says_no_is_told_of_at_once(guarded: AtBroker) -> None:
    for changes, error, what in (
        ({"password": "wrong"}, BadRequest, "refuses user 'alice': check"),
        ({"user": None, "password": None}, BadRequest, "refuses anonymous users"),
        ({"ca": None}, BadRequest, r"not trusted \(.*\).*\?ca="),
        ({"host": "localhost"}, BadRequest, "not trusted .*check the host's name"),
        ({"port": free_port()}, Unreachable, "no broker answers at 127.0.0.1:"),
    ):
        with pytest.raises(error, match=what):
            await MqttRegistry.start(replace(guarded.broker, **changes), MODEL)  # type: ignore[arg-type]


async def test_plain_words_to_a_tls_port(guarded: AtBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "ANSWER_S", 1.0)
    with pytest.raises(Unreachable, match="if that is a TLS port, write mqtts://"):
        await MqttRegistry.start(replace(guarded.broker, tls=False, ca=None), MODEL)


async def test_tls_to_a_plain_port(open_to_all: AtBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "ANSWER_S", 1.0)
    with pytest.raises((BadRequest, Unreachable), match=r"does not speak TLS|no broker answers"):
        await open_registry(f"mqtts://127.0.0.1:{open_to_all.port}/swarms/test", MODEL, Node().id)


async def test_a_user_who_may_not_write_is_told_so(guarded: AtBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "ANSWER_S", 1.0)
    guarded.broker = replace(guarded.broker, user="bob", password="battery staple")
    bob = await guarded.join()
    with pytest.raises(TransportError, match=r"does not pass it on: let user bob read and write swarms/test/#"):
        await bob.announce(Node().record())


@pytest.mark.slow
async def test_a_broker_that_falls_silent_is_left_and_found_again(guarded: AtBroker) -> None:
    writer, node = await guarded.join(), Node()
    assert guarded.process is not None
    os.kill(guarded.process.pid, signal.SIGSTOP)

    async def away() -> bool:
        return writer._connection.client is None

    await until(away, "the silence is noticed", timeout=3 * mqtt.KEEPALIVE_S)
    os.kill(guarded.process.pid, signal.SIGCONT)

    async def back() -> bool:
        return not await away()

    await until(back, "it is connected again")
    await writer.announce(node.record(4001))
