"""`swarm bench fuzz`: ten thousand hostile messages at real nodes.

Afterwards each node must run, serve correct text, and have all its room back.
"""

import asyncio
import contextlib
import itertools
import json
import random
import ssl
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import Malformed, Refused, SwarmError
from treeswarm.model_files import read_shape, resolve_model
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import Description, Fault, LinkHello, Message, Ping, Pong
from treeswarm.protocol.spans import Span
from treeswarm.transport.grpc import PATHS, GrpcTransport
from treeswarm.transport.grpc_streams import GrpcStream
from treeswarm.transport.seam import StreamKind
from treeswarm.transport.tls import Security
from treeswarm.wire.codec import decode_control_down, encode
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.hostile import (
    SESSIONS,
    TICKET,
    HostileMessage,
    honest_open,
    honest_prompt,
    hostile_first_bytes,
    hostile_messages,
)
from treeswarm_bench.raw_codec import RAW
from treeswarm_client.client import SwarmClient
from treeswarm_client.discovery.describe import describe
from treeswarm_client.local_swarm import LocalNode, LocalSwarm, local_swarm

# Above the largest hostile message.
SEND_LIMIT = 8 << 20
ATTACKERS = 4
# Share of links that begin honestly, on a session that is open, so that what follows passes the first checks.
HONEST_FIRST = 0.8
# Seconds to wait for the refusal of a link message: as long as all is well, a link answers nothing.
LINK_S = 0.01
ANSWER_S = 20.0
CONNECTION_S = 0.2
# Number of messages through gRPC for each bad connection below gRPC.
MESSAGES_PER_CONNECTION = 50
# A grace period and some more: by then a node has its room back from clients that vanished.
ROOM_S = 60.0
PROMPTS = ("def main():", "import os\n", "class A:")
TOKENS = 24
# Above the stamps of all hostile pings.
FIRST_STAMP = 1 << 40


@dataclass(eq=False)
class AssaultResult:
    """Counts of what was sent and what the node did."""

    sent: Counter[str] = field(default_factory=Counter)
    """Number of messages by their flaw."""
    refused: Counter[str] = field(default_factory=Counter)
    """Number of streams and sessions that the node ended, by code."""
    streams: int = 0
    unanswered: int = 0
    """Number of messages on a control stream after which neither a pong nor an end came: 0 if the node is well."""


@dataclass(eq=False)
class RawStream:
    """One stream of raw bytes, and what comes back on it."""

    stream: GrpcStream
    result: AssaultResult
    pongs: set[int] = field(default_factory=set)
    received: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.listening = asyncio.create_task(self._listen())

    async def send(self, data: bytes) -> None:
        """Send bytes; an error is counted by the task that listens."""
        raw: Any = data  # The transport's codec is RAW.
        with contextlib.suppress(SwarmError):
            await self.stream.send(raw)

    async def wait_until_handled(self, stamp: int) -> bool:
        """Return whether the node handles all that was sent, or ends the stream, within ANSWER_S seconds."""
        await self.send(encode(Ping(stamp)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                while stamp not in self.pongs and not self.listening.done():
                    self.received.clear()
                    await self.received.wait()
        return stamp in self.pongs or self.listening.done()

    async def close(self) -> None:
        """End the stream."""
        await self.stream.end()
        self.listening.cancel()
        await asyncio.gather(self.listening, return_exceptions=True)

    async def _listen(self) -> None:
        try:
            while (data := await self.stream.receive()) is not None:
                raw: Any = data
                self._take(decode_control_down(raw))
                self.received.set()
        except SwarmError as error:
            self.result.refused[_code(error)] += 1
        finally:
            self.received.set()

    def _take(self, message: Message) -> None:
        match message:
            case Pong(stamp):
                self.pongs = {stamp}
            case Fault(code=code):
                self.result.refused[code.value] += 1


@dataclass(eq=False)
class _Attacker:
    """A peer that opens a control and a link stream again whenever they end."""

    transport: GrpcTransport
    address: str
    described: Description
    session: bytes
    result: AssaultResult
    random: random.Random
    _streams: dict[StreamKind, RawStream] = field(default_factory=dict)
    _stamps: Iterator[int] = field(default_factory=lambda: itertools.count(FIRST_STAMP))

    async def send(self, message: HostileMessage) -> None:
        """Send one message, and wait until the node has handled it."""
        stream = await self._stream(message.kind)
        self.result.sent[message.flaw] += 1
        await stream.send(message.data)
        if message.kind is StreamKind.LINK:
            await asyncio.wait({stream.listening}, timeout=LINK_S)
        elif not await stream.wait_until_handled(next(self._stamps)):
            self.result.unanswered += 1
            await self._streams.pop(message.kind).close()

    async def close(self) -> None:
        """End the streams."""
        for stream in self._streams.values():
            await stream.close()
        self._streams.clear()

    async def _stream(self, kind: StreamKind) -> RawStream:
        stream = self._streams.pop(kind, None)
        if stream is not None and not stream.listening.done():
            self._streams[kind] = stream
            return stream
        if stream is not None:
            await stream.close()
        self.result.streams += 1
        stream = self._streams[kind] = RawStream(await self.transport.connect(self.address, kind), self.result)
        if kind is StreamKind.LINK and self.random.random() < HONEST_FIRST:
            control = await self._stream(StreamKind.CONTROL)
            await control.send(encode(honest_open(self.described, self.session)))
            await control.wait_until_handled(next(self._stamps))
            await stream.send(encode(LinkHello(PROTOCOL_VERSION, self.session, 0, TICKET)))
            await stream.send(encode(honest_prompt(self.described)))
        return stream


async def send_hostile_messages(
    address: str, security: Security, described: Description, *, messages: int, seed: int = 0
) -> AssaultResult:
    """Send that many hostile messages, from ATTACKERS peers at once.

    Raises SwarmError when the node does not answer any more.
    """
    result = AssaultResult()
    transport = GrpcTransport(security=security, codec=RAW, send_limit=SEND_LIMIT)
    stream = itertools.islice(hostile_messages(seed, described), messages)
    attackers = [
        _Attacker(transport, address, described, session, result, random.Random(seed + i))
        for i, session in enumerate(SESSIONS[:ATTACKERS])
    ]

    async def send_all(attacker: _Attacker) -> None:
        try:
            for message in stream:
                await attacker.send(message)
        finally:
            await attacker.close()

    try:
        await asyncio.gather(*(send_all(attacker) for attacker in attackers))
    finally:
        await transport.close()
    return result


async def open_bad_connections(address: str, *, times: int, seed: int = 0) -> None:
    """Open connections and begin them as no gRPC client would, every other one inside TLS.

    Raises OSError when the port refuses connections.
    """
    where = Address.parse(address)
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    inside.check_hostname, inside.verify_mode = False, ssl.CERT_NONE
    inside.set_alpn_protocols(["h2"])
    for number, data in enumerate(itertools.islice(hostile_first_bytes(seed, PATHS[StreamKind.CONTROL]), times)):
        tls = inside if number % 2 else None
        reader, writer = await asyncio.open_connection(where.host, where.port, ssl=tls)
        writer.write(data)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECTION_S):
                while await reader.read(1 << 16):
                    pass
        writer.transport.abort()


async def bench_fuzz(setup: BenchSetup, *, messages: int, seed: int = 0) -> dict[str, Any]:
    """Send `messages` hostile messages to two nodes, a head and a tail; return what they did.

    `well` is true if the swarm still works.
    """
    blocks = read_shape(resolve_model(setup.model)).blocks
    spans = [Span(0, 2), Span(2, blocks)]
    security = Security(swarm_key=setup.key)
    async with local_swarm(setup.model, spans, dtype=setup.dtype, swarm_key=setup.swarm_key) as swarm:
        before = await _texts(setup, swarm)
        results = [
            await _attack_node(node, security, messages=messages // len(spans), seed=seed + i)
            for i, node in enumerate(swarm.nodes)
        ]
        after = await _texts(setup, swarm)
        alive = all(node.process.returncode is None for node in swarm.nodes)
    errors = b"\n".join([await node.errors for node in swarm.nodes])
    tracebacks = [_readable(line) for line in errors.splitlines() if b"Traceback" in line]
    return {
        "bench": "fuzz",
        "sent": sum(result["sent"] for result in results),
        "node_alive": alive,
        "generations_after": len(after),
        "generations_after_ok": sum(a == b for a, b in zip(before, after, strict=True)),
        "well": alive and before == after and not tracebacks and all(result["room_back"] for result in results),
        "tracebacks": tracebacks,
        "nodes": results,
    }


async def _attack_node(node: LocalNode, security: Security, *, messages: int, seed: int) -> dict[str, Any]:
    """Send one node its share, and return what it did."""
    transport = GrpcTransport(security=security)
    before = await describe(transport, node.pinned)
    result = await send_hostile_messages(node.pinned, security, before, messages=messages, seed=seed)
    connections = messages // MESSAGES_PER_CONNECTION
    await open_bad_connections(node.address, times=connections, seed=seed)
    room_back = await _room_back(transport, node.pinned, before.trunk_free)
    frames = (await describe(transport, node.pinned)).frames - before.frames
    await transport.close()
    return {
        "blocks": str(before.span),
        "sent": result.sent.total(),
        "sent_by_kind": dict(result.sent.most_common()),
        "connections_below_grpc": connections,
        "streams": result.streams,
        "refused_by_code": dict(result.refused.most_common()),
        "frames_computed": frames,
        "unanswered": result.unanswered,
        "room_back": room_back,
    }


async def _texts(setup: BenchSetup, swarm: LocalSwarm) -> list[list[int]]:
    peers = ",".join(node.pinned for node in swarm.nodes)
    async with SwarmClient(model=setup.model, peers=peers, tree_size=0, swarm_key=setup.key) as client:
        return [(await client.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)).token_ids for prompt in PROMPTS]


async def _room_back(transport: GrpcTransport, address: str, expected: int) -> bool:
    """Return whether every row that hostile messages reserved becomes free within ROOM_S seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ROOM_S):
            while True:
                if (await describe(transport, address)).trunk_free == expected:
                    return True
                await asyncio.sleep(0.5)
    return False


def _readable(line: bytes) -> str:
    """Return the traceback in a line of a node's log, which is JSON, or the line itself."""
    return str(json.loads(line).get("traceback", "")) if line.startswith(b"{") else line.decode(errors="replace")


def _code(error: SwarmError) -> str:
    match error:
        case Refused(code=code):
            return str(code)
        case Malformed():
            return "malformed"
        case _:
            return type(error).__name__.lower()
