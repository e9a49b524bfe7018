"""What registries cost on loopback: `python -m treeswarm_bench.benchmarks.registry`, one table for docs.

Every byte between two members goes through a counting relay; for MQTT that is all of one member's traffic with the
broker, for the DHT all between two daemons, which are the whole swarm (one replica elsewhere, of at most 5).
"""

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.registry_media import LOOPBACK, MODEL, BrokerMedium, FakeNode, until

from treeswarm.registry.dht import DhtRegistry
from treeswarm.registry.mqtt import MqttRegistry
from treeswarm.registry.seam import Registry

ANNOUNCED = 30
SIZES = (20, 200)
IDLE_S = 30.0


@dataclass
class Relay:
    """Passes on what goes to a port, and counts it."""

    target: int
    port: int = 0
    carried: int = 0

    async def start(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.carried += len(data)
                writer.write(data)
        writer.close()


async def timed(act: Callable[[], Awaitable[object]], relay: Relay, times: int) -> str:
    took, carried = [], relay.carried
    for _ in range(times):
        begun = time.perf_counter()
        await act()
        took.append(1000 * (time.perf_counter() - begun))
    await asyncio.sleep(0.2)
    worst = sorted(took)[-1]
    return f"{statistics.median(took):.1f} ms (worst {worst:.0f}), {(relay.carried - carried) / times / 1000:.2f} kB"


async def idle(relay: Relay) -> str:
    carried = relay.carried
    await asyncio.sleep(IDLE_S)
    return f"{(relay.carried - carried) / IDLE_S:.0f} bytes/s"


async def seen(writer: Registry, reader: Registry) -> str:
    took = []
    for _ in range(10):
        sealed = FakeNode().record()
        begun = time.perf_counter()
        await writer.announce(sealed)
        while all(sealed.record.node != known.record.node for known in await reader.snapshot()):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        took.append(1000 * (time.perf_counter() - begun))
    return f"{statistics.median(took):.0f} ms (worst {max(took):.0f})"


async def dht() -> None:
    first = await DhtRegistry.start(MODEL, (), LOOPBACK, poll_s=1e6)
    _, _, head, peer = first.visible_maddrs[0].rsplit("/", 3)
    relay = Relay(int(first.visible_maddrs[0].split("/")[4]))
    await relay.start()
    begun = time.perf_counter()
    second = await DhtRegistry.start(MODEL, (f"/ip4/127.0.0.1/tcp/{relay.port}/{head}/{peer}",), LOOPBACK, poll_s=1e6)
    print(f"| DHT | join, daemon and all | {time.perf_counter() - begun:.2f} s, {relay.carried / 1000:.1f} kB |")
    node = FakeNode()
    print(f"| DHT | announce and read back | {await timed(lambda: second.announce(node.record()), relay, ANNOUNCED)} |")
    known = 1
    for size in SIZES:
        for _ in range(size - known):
            await first.announce(FakeNode().record())
        known = size
        print(
            f"| DHT | poll of {size} records (all 16 shards, 1 other peer) | {await timed(second._poll, relay, 20)} |"
        )
    print(f"| DHT | idle, not polling | {await idle(relay)} |")
    await second.close()
    await first.close()
    writer = await DhtRegistry.start(MODEL, (), LOOPBACK)
    reader = await DhtRegistry.start(MODEL, writer.visible_maddrs, LOOPBACK)
    print(f"| DHT | announced until another knows, polls as they are | {await seen(writer, reader)} |")
    await reader.close()
    await writer.close()


async def mqtt(kind: str) -> None:
    medium = BrokerMedium(kind)
    await medium.begin(Path(tempfile.mkdtemp()))
    relay = Relay(medium.port)
    await relay.start()
    here = replace(medium.broker, port=relay.port)
    writer = await MqttRegistry.start(medium.broker, MODEL)
    member, node = await MqttRegistry.start(here, MODEL), FakeNode()
    print(
        f"| {kind} | announce and read back | {await timed(lambda: member.announce(node.record()), relay, ANNOUNCED)} |"
    )
    print(f"| {kind} | announced until another knows | {await seen(writer, member)} |")
    known = 11
    for size in SIZES:
        for _ in range(size - known):
            await writer.announce(FakeNode().record())
        known = size
        carried, begun = relay.carried, time.perf_counter()
        late = await MqttRegistry.start(here, MODEL)

        async def has_all(late: MqttRegistry = late, size: int = size) -> bool:
            return len(await late.snapshot()) == size

        await until(has_all, f"{size} records")
        took, came = time.perf_counter() - begun, relay.carried - carried
        print(f"| {kind} | connect and read {size} records | {took:.2f} s, {came / 1000:.1f} kB |")
        await late.close()
    print(f"| {kind} | idle | {await idle(relay)} |")
    await member.close()
    await writer.close()
    await medium.end()


async def main() -> None:
    print(f"a record: {len(FakeNode().record().sealed)} bytes\n\n| registry | what | cost |\n|---|---|---|")
    await dht()
    for kind in ("mosquitto", "mosquitto tls", "amqtt"):
        await mqtt(kind)


if __name__ == "__main__":
    asyncio.run(main())
