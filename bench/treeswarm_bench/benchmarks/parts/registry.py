"""`swarm bench registry`: what each kind of registry costs on loopback, in time and in bytes.

Every byte between two members goes through a relay that counts.  For MQTT that is all traffic of one member with the
broker.  For the DHT it is all traffic between two daemons, which are the whole swarm: a record has one replica on
another peer, of at most 5.
"""

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from treeswarm.errors import BadRequest
from treeswarm.registry.dht import DhtRegistry
from treeswarm.registry.mqtt import MqttRegistry
from treeswarm.registry.seam import Registry
from treeswarm_bench.benchmarks.parts.brokers import KINDS, MOSQUITTO, BrokerProcess
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_client.provenance import machine_provenance

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
ANNOUNCED, POLLED, SEEN = 30, 20, 10
SIZES = (20, 200)
IDLE_S = 30.0
# Bytes of an action may still be on their way when it returns.
SETTLE_S = 0.2
SNAPSHOT_S = 120.0
# A DHT registry that never polls by itself: the bench polls.
NEVER_S = 1e6

Row = dict[str, Any]


@dataclass
class CountingRelay:
    """Forwards connections on a port of its own to a target port of loopback, and counts the bytes of both ways."""

    target: int
    port: int = 0
    carried: int = 0

    async def start(self) -> None:
        """Listen on a free port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self._forward(reader, target_writer), self._forward(target_reader, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.carried += len(data)
                writer.write(data)
        writer.close()


async def bench_registry() -> dict[str, Any]:
    """Measure a DHT and three brokers, one after another: `rows` of registry, action, milliseconds or seconds, bytes.

    Raises BadRequest if mosquitto or amqtt is not installed.
    """
    if MOSQUITTO is None:
        raise BadRequest("mosquitto is not installed: apt install mosquitto")
    if find_spec("amqtt") is None:
        raise BadRequest("amqtt is not installed: pip install amqtt")
    rows = await _dht_rows()
    for kind in KINDS:
        rows += await _broker_rows(kind)
    return {
        "bench": "registry",
        "record_bytes": len(FakeNode().record().sealed),
        "rows": rows,
        "provenance": machine_provenance(),
    }


async def _dht_rows() -> list[Row]:
    first = await DhtRegistry.start(MODEL, (), LOOPBACK, poll_s=NEVER_S)
    _, _, head, peer = first.visible_maddrs[0].rsplit("/", 3)
    relay = CountingRelay(int(first.visible_maddrs[0].split("/")[4]))
    await relay.start()
    start = time.perf_counter()
    through_relay = (f"/ip4/127.0.0.1/tcp/{relay.port}/{head}/{peer}",)
    second = await DhtRegistry.start(MODEL, through_relay, LOOPBACK, poll_s=NEVER_S)
    rows: list[Row] = [
        {"what": "join, start of the daemon included", "s": time.perf_counter() - start, "bytes": relay.carried}
    ]
    node = FakeNode()
    rows.append(
        {
            "what": "announce and read back",
            **await _repeat(lambda: second.announce(node.record()), relay, ANNOUNCED),
        }
    )
    announced = 1
    for size in SIZES:
        for _ in range(size - announced):
            await first.announce(FakeNode().record())
        announced = size
        what = f"poll of {size} records (all 16 shards, 1 other peer)"
        rows.append({"what": what, **await _repeat(second._poll, relay, POLLED)})
    rows.append({"what": "idle, not polling", **await _idle(relay)})
    await second.close()
    await first.close()
    writer = await DhtRegistry.start(MODEL, (), LOOPBACK)
    reader = await DhtRegistry.start(MODEL, writer.visible_maddrs, LOOPBACK)
    rows.append(
        {"what": "announced until another member knows, with default polls", **await _until_seen(writer, reader)}
    )
    await reader.close()
    await writer.close()
    return [{"registry": "DHT", **row} for row in rows]


async def _broker_rows(kind: str) -> list[Row]:
    process = BrokerProcess(kind)
    with tempfile.TemporaryDirectory(prefix="treeswarm-broker-") as folder:
        try:
            await process.begin(Path(folder))
            return [{"registry": kind, **row} for row in await _mqtt_rows(process)]
        finally:
            await process.kill()


async def _mqtt_rows(process: BrokerProcess) -> list[Row]:
    relay = CountingRelay(process.port)
    await relay.start()
    through_relay = replace(process.broker, port=relay.port)
    writer = await MqttRegistry.start(process.broker, MODEL)
    member, node = await MqttRegistry.start(through_relay, MODEL), FakeNode()
    rows: list[Row] = [
        {"what": "announce and read back", **await _repeat(lambda: member.announce(node.record()), relay, ANNOUNCED)},
        {"what": "announced until another member knows", **await _until_seen(writer, member)},
    ]
    announced = 1 + SEEN
    for size in SIZES:
        for _ in range(size - announced):
            await writer.announce(FakeNode().record())
        announced = size
        carried, start = relay.carried, time.perf_counter()
        late = await MqttRegistry.start(through_relay, MODEL)
        await _until_complete(late, size)
        seconds = time.perf_counter() - start
        rows.append({"what": f"connect and read {size} records", "s": seconds, "bytes": relay.carried - carried})
        await late.close()
    rows.append({"what": "idle", **await _idle(relay)})
    await member.close()
    await writer.close()
    return rows


async def _repeat(act: Callable[[], Awaitable[object]], relay: CountingRelay, times: int) -> Row:
    """Return the median and the worst milliseconds of an action, and the bytes of one."""
    taken, carried = [], relay.carried
    for _ in range(times):
        start = time.perf_counter()
        await act()
        taken.append(1e3 * (time.perf_counter() - start))
    await asyncio.sleep(SETTLE_S)
    return {"ms": _median_and_worst(taken), "bytes": (relay.carried - carried) / times}


async def _idle(relay: CountingRelay) -> Row:
    carried = relay.carried
    await asyncio.sleep(IDLE_S)
    return {"bytes_per_s": (relay.carried - carried) / IDLE_S}


async def _until_seen(writer: Registry, reader: Registry) -> Row:
    """Return the median and the worst milliseconds from an announcement until another member's snapshot holds it."""
    taken = []
    for _ in range(SEEN):
        sealed = FakeNode().record()
        start = time.perf_counter()
        await writer.announce(sealed)
        while all(sealed.record.node != other.record.node for other in await reader.snapshot()):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        taken.append(1e3 * (time.perf_counter() - start))
    return {"ms": _median_and_worst(taken)}


async def _until_complete(registry: Registry, size: int) -> None:
    async with asyncio.timeout(SNAPSHOT_S):
        while len(await registry.snapshot()) != size:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def _median_and_worst(milliseconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(milliseconds), "worst": max(milliseconds)}
