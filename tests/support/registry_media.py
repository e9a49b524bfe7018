"""Media that store records in the registries' tests: real brokers, a real DHT, nodes that report, and one process."""

import asyncio
import contextlib
import datetime
import ipaddress
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from treeswarm.protocol.messages import NumericsClass, Records, Watch
from treeswarm.protocol.records import LIFETIME_S, NodeRecord, NodeState, SealedRecord, node_id
from treeswarm.protocol.spans import Span
from treeswarm.registry.dht import DhtRegistry
from treeswarm.registry.dht_peer import dht_expiry, shard_key
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.registry.mqtt import MqttRegistry
from treeswarm.registry.peers import PeersRegistry
from treeswarm.registry.seam import Registry
from treeswarm.registry.spec import Broker
from treeswarm.transport.memory import MemoryListener, MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm.wire.sealing import seal

MODEL, OTHER_MODEL = "ab" * 32, "cd" * 32
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
Clock = Callable[[], float]


@dataclass
class FakeNode:
    """A key, and the records signed with it.  Each record has a higher generation than the one before."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    generation: int = 0

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    @property
    def id(self) -> str:
        return node_id(self.public_key)

    def sign(self, data: bytes) -> bytes:
        return self.key.sign(data)

    def record(self, port: int = 4001, **changes: Any) -> SealedRecord:
        """Sign a new record for an address at `port`, with some fields changed."""
        self.generation = max(self.generation + 1, time.time_ns() // 1000)
        fields: dict[str, Any] = {
            "key": self.public_key,
            "generation": self.generation,
            "expires": int(time.time()) + LIFETIME_S,
            "state": NodeState.ONLINE,
            "address": f"127.0.0.1:{port}",
            "pin": "0f" * 16,
            "reachable": True,
            "name": "demo",
            "model": MODEL,
            "numerics": NumericsClass("01" * 32, "float32", ""),
            "span": Span(0, 4),
            "blocks": 8,
            "rate": 1000.0,
            "hop_s": 2.0**-9,  # Floats are float32 on the wire.
            "free_tokens": 4096,
            "total_tokens": 8192,
            "coordinate": (0.25, 0.5),
            "software": "test",
        }
        return seal(NodeRecord(**fields | changes), self)


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
class BrokerMedium:
    """A broker in a process of its own."""

    kind: str
    """Kind of broker: `amqtt`, `mosquitto` or `mosquitto tls`."""
    port: int = 0
    broker: Broker = field(init=False)
    process: "subprocess.Popen[bytes] | None" = None
    joined: list[MqttRegistry] = field(default_factory=list)

    async def begin(self, folder: Path) -> None:
        if self.kind != "amqtt" and MOSQUITTO is None:
            # In CI, a missing broker must not look like a passed suite.
            (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")
        self.folder, self.port = folder, free_port()
        secure = "tls" in self.kind
        self.broker = Broker(
            "127.0.0.1",
            self.port,
            "swarms/test",
            tls=secure,
            user="alice" if secure else None,
            password="correct horse" if secure else None,
            ca=folder / "ca.pem" if secure else None,
        )
        self.command = self._amqtt() if self.kind == "amqtt" else self._mosquitto(secure)
        await self.restore()

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

    async def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    async def restore(self) -> None:
        self.process = subprocess.Popen(  # noqa: ASYNC220  # It does not block, as its output is not read.
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await until(self._listens, f"{self.kind} listens on {self.port}")

    async def _listens(self) -> bool:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.transport.abort()
            return True
        return False

    async def end(self) -> None:
        for registry in self.joined:
            await registry.close()
        await self.kill()

    def _amqtt(self) -> list[str]:
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        code = f"""
import asyncio
from amqtt.broker import Broker
async def serve():
    await Broker({config!r}).start()
    await asyncio.Event().wait()
asyncio.run(serve())
"""
        return [sys.executable, "-c", code]

    def _mosquitto(self, secure: bool) -> list[str]:
        lines = [f"listener {self.port} 127.0.0.1", f"allow_anonymous {str(not secure).lower()}", "persistence false"]
        if os.geteuid() == 0:
            lines.append("user root")  # Otherwise it could not read this folder.
        if secure:
            make_certificates(self.folder)
            passwords, access = self.folder / "passwords", self.folder / "access"
            passwords.write_text("alice:correct horse\nbob:battery staple\n")
            subprocess.run(["mosquitto_passwd", "-U", str(passwords)], check=True)
            access.write_text("user alice\ntopic readwrite #\nuser bob\ntopic read #\n")
            lines += [f"certfile {self.folder}/server.pem", f"keyfile {self.folder}/server.key"]
            lines += [f"password_file {passwords}", f"acl_file {access}"]
        config = self.folder / "mosquitto.conf"
        config.write_text("\n".join(lines) + "\n")
        assert MOSQUITTO is not None
        return [MOSQUITTO, "-c", str(config)]


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


def make_certificates(folder: Path) -> None:
    """Write the certificates of an authority, and of a server at 127.0.0.1 that it signs."""
    now = datetime.datetime.now(datetime.UTC)
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def certificate(name: str, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(authority_key, hashes.SHA256())

    authority = certificate("test authority", authority_key, x509.BasicConstraints(ca=True, path_length=None))
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(authority.public_bytes(pem))
    (folder / "server.pem").write_bytes(certificate("server", server_key, loopback).public_bytes(pem))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


MEDIA: dict[str, Callable[[], Medium]] = {
    "memory": MemoryMedium,
    "peers": PeersMedium,
    "dht": DhtMedium,
    "amqtt": lambda: BrokerMedium("amqtt"),
    "mosquitto": lambda: BrokerMedium("mosquitto"),
    "mosquitto tls": lambda: BrokerMedium("mosquitto tls"),
}
