"""Media that store records in the registries' tests: real brokers, a real DHT, nodes that report, and one process."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from treeswarm.protocol.messages import Records, Watch
from treeswarm.protocol.records import LIFETIME_S, SealedRecord
from treeswarm.registry.dht import DhtRegistry
from treeswarm.registry.dht_peer import dht_expiry, shard_key
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.registry.mqtt import MqttRegistry
from treeswarm.registry.peers import PeersRegistry
from treeswarm.registry.seam import Registry
from treeswarm.transport.memory import MemoryListener, MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.brokers import MOSQUITTO, BrokerProcess
from treeswarm_bench.benchmarks.parts.fake_node import MODEL

OTHER_MODEL = "cd" * 32
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
Clock = Callable[[], float]


async def until(condition: Callable[[], Awaitable[bool]], description: str, timeout: float = 120.0) -> None:
    """Wait until a condition holds, by checking it repeatedly."""
    deadline = time.monotonic() + timeout
    while not await condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {description}"
        await asyncio.sleep(0.05)


async def until_known(registry: Registry, *addresses: str) -> None:
    """Wait until exactly the nodes at these addresses are known."""

    async def known() -> bool:
        return sorted(sealed.record.address for sealed in await registry.snapshot()) == sorted(addresses)

    await until(known, f"the known nodes are {addresses}")


def _is_project_task(task: "asyncio.Task[object]") -> bool:
    """Return whether a task belongs to this project: libraries' own tasks may end later."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and "treeswarm" in code.co_filename


async def all_ended(before: set[psutil.Process]) -> None:
    """Wait until every task, and every child process that is not in `before`, has ended."""
    left: list[object] = []

    async def nothing_left() -> bool:
        this = asyncio.current_task()
        left[:] = [task for task in asyncio.all_tasks() if task is not this and _is_project_task(task)]
        left.extend(set(psutil.Process().children(recursive=True)) - before)
        return not left

    try:
        await until(nothing_left, "all tasks and processes end", timeout=60)
    except AssertionError:
        raise AssertionError(f"left over: {left}") from None


class Medium(Protocol):
    """A medium that stores records, which tests can stop and restart."""

    async def begin(self, folder: Path) -> None: ...

    async def member(self) -> Registry:
        """Return a registry that announces and reads."""
        ...

    async def reader(self, clock: Clock = time.time) -> Registry:
        """Return a registry that reads what members announce."""
        ...

    async def put(self, node: str, sealed: bytes) -> None:
        """Store bytes under a node's id as an attacker would, without our checks."""
        ...

    async def kill(self) -> None: ...

    async def restore(self) -> None: ...

    async def end(self) -> None: ...


@dataclass
class MemoryMedium:
    """A single registry in this process."""

    registry: MemoryRegistry = field(default_factory=lambda: MemoryRegistry(MODEL))

    async def begin(self, folder: Path) -> None: ...

    async def member(self) -> Registry:
        return self.registry

    async def reader(self, clock: Clock = time.time) -> Registry:
        self.registry.book.clock = clock
        return self.registry

    async def put(self, node: str, sealed: bytes) -> None:
        await self.registry.add_records([sealed])

    async def kill(self) -> None: ...

    async def restore(self) -> None: ...

    async def end(self) -> None: ...


@dataclass(eq=False)
class PeersMedium:
    """A node that reports all records it was given, and clients that ask it."""

    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    records: list[bytes] = field(default_factory=list)
    listener: MemoryListener | None = None
    readers: list[PeersRegistry] = field(default_factory=list)

    async def begin(self, folder: Path) -> None:
        await self.restore()

    async def member(self) -> Registry:
        medium = self

        class ReportedRegistry(MemoryRegistry):
            async def announce(self, sealed: SealedRecord) -> None:
                medium.records.append(sealed.sealed)
                await super().announce(sealed)

            withdraw = announce

        return ReportedRegistry(MODEL)

    async def reader(self, clock: Clock = time.time) -> Registry:
        reader = PeersRegistry(MODEL, clock, transport=self.network.transport(), addresses=("node:1",))
        self.readers.append(reader)
        # Not `start`, which raises an error if there is no record yet.
        reader._keeper = asyncio.create_task(reader._keep_asking())
        return reader

    async def put(self, node: str, sealed: bytes) -> None:
        self.records.append(sealed)

    async def kill(self) -> None:
        if self.listener is not None:
            await self.listener.close()

    async def restore(self) -> None:
        self.listener = await self.network.transport().listen("node:1", self._report)

    async def end(self) -> None:
        for reader in self.readers:
            await reader.close()
        await self.kill()

    async def _report(self, kind: StreamKind, stream: Stream) -> None:
        assert isinstance(await stream.receive(), Watch)
        sent = 0
        while True:
            await stream.send(Records(tuple(self.records[sent:])))
            sent = len(self.records)
            while len(self.records) == sent:
                await asyncio.sleep(0.01)


@dataclass(eq=False)
class DhtMedium:
    """Four daemons: the first one, a member, a reader and an attacker."""

    first: DhtRegistry | None = None
    joined: list[DhtRegistry] = field(default_factory=list)
    attacker: tuple[Any, Any] | None = None

    async def begin(self, folder: Path) -> None:
        self.folder, self.listen = folder, LOOPBACK
        await self.restore()

    async def _join(self, clock: Clock = time.time) -> DhtRegistry:
        assert self.first is not None
        self.joined.append(
            await DhtRegistry.start(MODEL, self.first.visible_maddrs, LOOPBACK, clock=clock, poll_s=0.3),
        )
        return self.joined[-1]

    async def member(self) -> Registry:
        return await self._join()

    async def reader(self, clock: Clock = time.time) -> Registry:
        return await self._join(clock)

    async def put(self, node: str, sealed: bytes) -> None:
        from hivemind.dht.node import DHTNode
        from hivemind.p2p import P2P

        assert self.first is not None
        if self.attacker is None:
            p2p = await P2P.create(initial_peers=self.first.visible_maddrs)
            self.attacker = p2p, await DHTNode.create(p2p, initial_peers=self.first.visible_maddrs)
        # With the latest expiry that other peers accept, so that it would win over every honest entry.
        for expiry in (time.time() + LIFETIME_S + 100, dht_expiry(time.time_ns() // 1000)):
            await self.attacker[1].store(shard_key(MODEL, node), sealed, expiry, subkey=node)

    async def put_dated(self, sealed: SealedRecord) -> None:
        """Store a signed record as its own node would."""
        await self.put("0" * 32, b"")
        assert self.attacker is not None
        expiry = dht_expiry(sealed.record.generation)
        await self.attacker[1].store(
            shard_key(MODEL, sealed.record.node), sealed.sealed, expiry, subkey=sealed.record.node
        )

    async def kill(self) -> None:
        assert self.first is not None
        self.listen = self.first.daemon.listen
        self.first._tasks.cancel()  # Otherwise it would come back at once.
        kill_daemon(self.first)
        await self.first.close()

    async def restore(self) -> None:
        self.first = await DhtRegistry.start(MODEL, (), self.listen, self.folder / "identity", poll_s=0.3)

    async def end(self) -> None:
        if self.attacker is not None:
            p2p, node = self.attacker
            await node.shutdown()
            await p2p.shutdown()
        for registry in (*self.joined, self.first):
            if registry is not None:
                await registry.close()


def kill_daemon(registry: DhtRegistry) -> None:
    assert registry.daemon.current is not None
    os.kill(registry.daemon.current.p2p._child.pid, signal.SIGKILL)


@dataclass(eq=False)
class BrokerMedium(BrokerProcess):
    """A broker in a process of its own."""

    joined: list[MqttRegistry] = field(default_factory=list)

    async def begin(self, folder: Path) -> None:
        if self.kind != "amqtt" and MOSQUITTO is None:
            # In CI, a missing broker must not look like a passed suite.
            (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")
        await super().begin(folder)

    async def member(self) -> Registry:
        return await self.join()

    async def reader(self, clock: Clock = time.time) -> Registry:
        return await self.join(clock=clock)

    async def join(self, node: str | None = None, clock: Clock = time.time) -> MqttRegistry:
        self.joined.append(await MqttRegistry.start(self.broker, MODEL, node, clock))
        return self.joined[-1]

    async def put(self, node: str, sealed: bytes) -> None:
        registry = self.joined[0]
        assert registry._connection.client is not None
        await registry._connection.client.publish(f"swarms/test/{MODEL}/{node}", sealed, qos=1, retain=True)

    async def end(self) -> None:
        for registry in self.joined:
            await registry.close()
        await self.kill()


def free_port() -> int:
    """Return a port that stays free until it is bound.

    It is below the ports that the kernel assigns to connections: other tests open hundreds of them in the seconds that
    a program takes to start.
    """
    ephemeral_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, ephemeral_from)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


MEDIA: dict[str, Callable[[], Medium]] = {
    "memory": MemoryMedium,
    "peers": PeersMedium,
    "dht": DhtMedium,
    "amqtt": lambda: BrokerMedium("amqtt"),
    "mosquitto": lambda: BrokerMedium("mosquitto"),
    "mosquitto tls": lambda: BrokerMedium("mosquitto tls"),
}
