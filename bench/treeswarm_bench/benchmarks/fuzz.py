"""Ten thousand hostile messages at a real node: is it still there, does it still serve, has it all its room back?"""

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
    honest_prompt,
    hostile_first_bytes,
    hostile_messages,
    opening,
)
from treeswarm_bench.raw_codec import RAW
from treeswarm_client.client import SwarmClient
from treeswarm_client.discovery.describe import describe
from treeswarm_client.local_swarm import LocalNode, LocalSwarm, local_swarm

# Above the largest hostile message.
SEND_LIMIT = 8 << 20
ATTACKERS = 4
# So many links begin honestly, on a session that is open: what follows gets past the door.
HONEST_FIRST = 0.8
# A link answers nothing while all is well; its refusal is waited for so long.
LINK_S = 0.01
ANSWER_S = 20.0
KNOCK_S = 0.2
# One connection below gRPC for so many messages through it.
MESSAGES_A_KNOCK = 50
# A lease and some patience: by then a node has its room back from whoever vanished.
ROOM_S = 60.0
PROMPTS = ("def main():", "import os\n", "class A:")
TOKENS = 24
# Not a stamp that a hostile ping has.
FIRST_STAMP = 1 << 40


@dataclass(eq=False)
class AssaultResult:
    """What became of it all."""

    sent: Counter[str] = field(default_factory=Counter)
    """Messages, by how they were wrong."""
    refused: Counter[str] = field(default_factory=Counter)
    """Streams and sessions ended, by code."""
    streams: int = 0
    unanswered: int = 0
    """Times that neither a pong nor an end followed a message on a control stream: none, if the node is well."""


@dataclass(eq=False)
class _Line:
    """One raw stream and what comes back on it."""

    stream: GrpcStream
    toll: AssaultResult
    pongs: set[int] = field(default_factory=set)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.listening = asyncio.create_task(self._listen())

    async def send(self, data: bytes) -> None:
        raw: Any = data  # the transport's codec is RAW
        with contextlib.suppress(SwarmError):  # whoever listens is told why
            await self.stream.send(raw)

    async def until_seen(self, stamp: int) -> bool:
        """Whether the node has dealt with all that was sent, or ended the stream."""
        await self.send(encode(Ping(stamp)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                while stamp not in self.pongs and not self.listening.done():
                    self.news.clear()
                    await self.news.wait()
        return stamp in self.pongs or self.listening.done()

    async def close(self) -> None:
        await self.stream.end()
        self.listening.cancel()
        await asyncio.gather(self.listening, return_exceptions=True)

    async def _listen(self) -> None:
        try:
            while (data := await self.stream.receive()) is not None:
                raw: Any = data
                self._take(decode_control_down(raw))
                self.news.set()
        except SwarmError as error:
            self.toll.refused[_code(error)] += 1
        finally:
            self.news.set()

    def _take(self, message: Message) -> None:
        match message:
            case Pong(stamp):
                self.pongs = {stamp}
            case Fault(code=code):
                self.toll.refused[code.value] += 1


@dataclass(eq=False)
class _Attacker:
    """Keeps a control and a link stream open, again and again."""

    transport: GrpcTransport
    address: str
    described: Description
    session: bytes
    toll: AssaultResult
    chance: random.Random
    _lines: dict[StreamKind, _Line] = field(default_factory=dict)
    _stamps: Iterator[int] = field(default_factory=lambda: itertools.count(FIRST_STAMP))

    async def send(self, hostile: HostileMessage) -> None:
        line = await self._line(hostile.kind)
        self.toll.sent[hostile.what] += 1
        await line.send(hostile.data)
        if hostile.kind is StreamKind.LINK:
            await asyncio.wait({line.listening}, timeout=LINK_S)
        elif not await line.until_seen(next(self._stamps)):
            self.toll.unanswered += 1
            await self._lines.pop(hostile.kind).close()

    async def close(self) -> None:
        for line in self._lines.values():
            await line.close()
        self._lines.clear()

    async def _line(self, kind: StreamKind) -> _Line:
        known = self._lines.pop(kind, None)
        if known is not None and not known.listening.done():
            self._lines[kind] = known
            return known
        if known is not None:
            await known.close()
        self.toll.streams += 1
        line = self._lines[kind] = _Line(await self.transport.connect(self.address, kind), self.toll)
        if kind is StreamKind.LINK and self.chance.random() < HONEST_FIRST:
            control = await self._line(StreamKind.CONTROL)
            await control.send(encode(opening(self.described, self.session)))
            await control.until_seen(next(self._stamps))
            await line.send(encode(LinkHello(PROTOCOL_VERSION, self.session, 0, TICKET)))
            await line.send(encode(honest_prompt(self.described)))
        return line


async def send_hostile_messages(
    address: str, security: Security, described: Description, *, messages: int, seed: int = 0
) -> AssaultResult:
    """Send so many hostile messages from several sides at once.  Raises SwarmError when nobody answers any more."""
    toll = AssaultResult()
    transport = GrpcTransport(security=security, codec=RAW, send_limit=SEND_LIMIT)
    stream = itertools.islice(hostile_messages(seed, described), messages)
    attackers = [
        _Attacker(transport, address, described, session, toll, random.Random(seed + i))
        for i, session in enumerate(SESSIONS[:ATTACKERS])
    ]

    async def attack(attacker: _Attacker) -> None:
        try:
            for hostile in stream:
                await attacker.send(hostile)
        finally:
            await attacker.close()

    try:
        await asyncio.gather(*(attack(attacker) for attacker in attackers))
    finally:
        await transport.close()
    return toll


async def open_bad_connections(address: str, *, times: int, seed: int = 0) -> None:
    """Begin connections as no gRPC client would, every other one inside TLS.  Raises OSError when the port is shut."""
    where = Address.parse(address)
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    inside.check_hostname, inside.verify_mode = False, ssl.CERT_NONE
    inside.set_alpn_protocols(["h2"])
    for number, data in enumerate(itertools.islice(hostile_first_bytes(seed, PATHS[StreamKind.CONTROL]), times)):
        tls = inside if number % 2 else None
        reader, writer = await asyncio.open_connection(where.host, where.port, ssl=tls)
        writer.write(data)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(KNOCK_S):
                while await reader.read(1 << 16):
                    pass
        writer.transport.abort()


async def bench_fuzz(setup: BenchSetup, *, messages: int, seed: int = 0) -> dict[str, Any]:
    """What two nodes, a head and a tail, make of `messages` hostile ones, and whether the swarm still works."""
    blocks = read_shape(resolve_model(setup.model)).blocks
    spans = [Span(0, 2), Span(2, blocks)]
    security = Security(swarm_key=setup.key)
    async with local_swarm(setup.model, spans, dtype=setup.dtype, swarm_key=setup.swarm_key) as swarm:
        texts = await _texts(setup, swarm)
        fates = [
            await _besiege(node, security, messages=messages // len(spans), seed=seed + i)
            for i, node in enumerate(swarm.nodes)
        ]
        again = await _texts(setup, swarm)
        alive = all(node.process.returncode is None for node in swarm.nodes)
    said = b"\n".join([await node.errors for node in swarm.nodes])
    tracebacks = [_readable(line) for line in said.splitlines() if b"Traceback" in line]
    return {
        "bench": "fuzz",
        "sent": sum(fate["sent"] for fate in fates),
        "node_alive": alive,
        "generations_after": len(again),
        "generations_after_ok": sum(a == b for a, b in zip(texts, again, strict=True)),
        "well": alive and texts == again and not tracebacks and all(fate["room_back"] for fate in fates),
        "tracebacks": tracebacks,
        "nodes": fates,
    }


async def _besiege(node: LocalNode, security: Security, *, messages: int, seed: int) -> dict[str, Any]:
    """One node's share, and what it made of it."""
    transport = GrpcTransport(security=security)
    before = await describe(transport, node.pinned)
    toll = await send_hostile_messages(node.pinned, security, before, messages=messages, seed=seed)
    knocks = messages // MESSAGES_A_KNOCK
    await open_bad_connections(node.address, times=knocks, seed=seed)
    room_back = await _room_back(transport, node.pinned, before.trunk_free)
    frames = (await describe(transport, node.pinned)).frames - before.frames
    await transport.close()
    return {
        "blocks": str(before.span),
        "sent": toll.sent.total(),
        "sent_by_kind": dict(toll.sent.most_common()),
        "connections_below_grpc": knocks,
        "streams": toll.streams,
        "refused_by_code": dict(toll.refused.most_common()),
        "frames_computed": frames,
        "unanswered": toll.unanswered,
        "room_back": room_back,
    }


async def _texts(setup: BenchSetup, swarm: LocalSwarm) -> list[list[int]]:
    peers = ",".join(node.pinned for node in swarm.nodes)
    async with SwarmClient(model=setup.model, peers=peers, tree_size=0, swarm_key=setup.key) as client:
        return [(await client.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)).token_ids for prompt in PROMPTS]


async def _room_back(transport: GrpcTransport, address: str, expected: int) -> bool:
    """Whether every row that the assault reserved comes free."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ROOM_S):
            while True:
                if (await describe(transport, address)).trunk_free == expected:
                    return True
                await asyncio.sleep(0.5)
    return False


def _readable(line: bytes) -> str:
    """A line of the node's log, which is JSON."""
    return str(json.loads(line).get("traceback", "")) if line.startswith(b"{") else line.decode(errors="replace")


def _code(error: SwarmError) -> str:
    match error:
        case Refused(code=code):
            return str(code)
        case Malformed():
            return "malformed"
        case _:
            return type(error).__name__.lower()
