"""The node: accepts control and link streams, hosts sessions, answers what it is asked."""

import asyncio
import logging
import secrets
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION, __version__
from treeswarm.errors import Refused, TransportError
from treeswarm.messages import (
    MAX_CROWN,
    Close,
    Describe,
    Description,
    Fault,
    FaultCode,
    Hint,
    LinkHello,
    NumericsClass,
    Open,
    Opened,
    Ping,
    Pong,
)
from treeswarm.session import NodeSession, SessionTerms
from treeswarm.spans import Span
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.config import Limits
from treeswarm_node.engine import Engine
from treeswarm_node.hosted import HostedSession
from treeswarm_node.kv import KVStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What this node hosts, as it tells clients."""

    span: Span
    blocks: int
    vocab_size: int
    hidden_size: int
    max_positions: int
    config: str
    numerics: NumericsClass
    attention: str
    activation_bytes: int
    """Of one row on a link."""


@dataclass(eq=False)
class Node:
    """`accept` is handed to a transport's `listen`; `engine.run()` must be running."""

    served: Served
    engine: Engine
    store: KVStore
    transport: Transport
    limits: Limits = Limits()
    sessions: dict[bytes, HostedSession] = field(default_factory=dict)

    async def accept(self, kind: StreamKind, stream: Stream) -> None:
        """Serve one stream until it ends.  What it raises ends that stream alone."""
        await (self._control(stream) if kind is StreamKind.CONTROL else self._link(stream))

    async def close(self) -> None:
        """Tell every client, free every session."""
        for hosted in list(self.sessions.values()):
            await hosted.fail(Refused("the node is shutting down", FaultCode.REFUSED))

    # ---------------------------------------------------------------- control streams

    async def _control(self, stream: Stream) -> None:
        mine: dict[bytes, HostedSession] = {}
        try:
            while (message := await stream.receive()) is not None:
                await self._obey(message, stream, mine)
        except TransportError:
            await asyncio.sleep(self.limits.lease_s)
        finally:
            for hosted in list(mine.values()):
                await hosted.free()

    async def _obey(self, message: object, stream: Stream, mine: dict[bytes, HostedSession]) -> None:
        match message:
            case Describe():
                await stream.send(self._describe())
            case Ping(stamp):
                await stream.send(Pong(stamp))
            case Open():
                await self._open(message, stream, mine)
            case Hint(session) if session in mine:
                mine[session].session.hint(message)
            case Close(session) if session in mine:
                await mine.pop(session).free()
            case Hint() | Close():
                pass  # of a session that has just failed: its Fault is on the way
            case _:
                raise Refused(f"{type(message).__name__} does not belong on a control stream", FaultCode.MALFORMED)

    def _describe(self) -> Description:
        served, counters = self.served, self.engine.counters
        return Description(
            version=PROTOCOL_VERSION,
            software=f"treeswarm {__version__}",
            span=served.span,
            blocks=served.blocks,
            vocab_size=served.vocab_size,
            hidden_size=served.hidden_size,
            max_positions=served.max_positions,
            config=served.config,
            numerics=served.numerics,
            attention=served.attention,
            trunk_free=self.store.free_tokens,
            frames=counters.frames,
            forwards=counters.forwards,
            forward_sessions=counters.forward_sessions,
        )

    async def _open(self, wanted: Open, stream: Stream, mine: dict[bytes, HostedSession]) -> None:
        try:
            hosted = self._host(wanted, stream)
        except Refused as error:
            await stream.send(Fault(wanted.session, FaultCode(error.code), str(error), fatal=True))
            return
        mine[wanted.session] = hosted
        hosted.begin()
        log.info("session %s opened for blocks %s by %s", hosted.name, wanted.span, stream.peer)
        await stream.send(Opened(wanted.session, wanted.epoch, hosted.session.terms.credit_rows))

    def _host(self, wanted: Open, stream: Stream) -> HostedSession:
        self._check_open(wanted)
        terms = SessionTerms(
            epoch=wanted.epoch,
            trunk_room=wanted.trunk_room,
            crown_room=wanted.crown_room,
            credit_rows=max(self.limits.credit_rows, 2 * wanted.crown_room),
            vocab_size=self.served.vocab_size,
            row_bytes=0 if wanted.span.start == 0 else self.served.activation_bytes,
        )
        hosted = HostedSession(
            opened=wanted,
            session=NodeSession(terms),
            kv=self.store.open(wanted.trunk_room, wanted.crown_room),
            control=stream,
            engine=self.engine,
            transport=self.transport,
            forget=lambda: self._forget(wanted.session),
        )
        self.sessions[wanted.session] = hosted
        return hosted

    def _forget(self, session: bytes) -> None:
        self.sessions.pop(session, None)

    def _check_open(self, wanted: Open) -> None:
        served = self.served
        for wrong, code, why in (
            (
                wanted.version != PROTOCOL_VERSION,
                FaultCode.WRONG_VERSION,
                f"protocol {wanted.version} is spoken, this node speaks {PROTOCOL_VERSION}: install the same release",
            ),
            (
                wanted.numerics != served.numerics,
                FaultCode.MISMATCH,
                f"this node serves {_class_name(served.numerics)}, not {_class_name(wanted.numerics)}",
            ),
            (
                wanted.span not in served.span,
                FaultCode.MISMATCH,
                f"this node serves blocks {served.span}, not {wanted.span}",
            ),
            (
                (wanted.span.end == served.blocks) != (wanted.next_hop is None),
                FaultCode.MISMATCH,
                "the last block's node, and it alone, has no next hop",
            ),
            (wanted.session in self.sessions, FaultCode.REFUSED, "a session of this id is open"),
            (
                len(self.sessions) >= self.limits.sessions,
                FaultCode.FULL,
                f"this node is full: {len(self.sessions)} sessions are open",
            ),
            (
                wanted.trunk_room > served.max_positions,
                FaultCode.OUT_OF_ROOM,
                f"{wanted.trunk_room} tokens were asked for, the model's context is {served.max_positions}",
            ),
            (wanted.crown_room > MAX_CROWN, FaultCode.OUT_OF_ROOM, f"a crown has at most {MAX_CROWN} rows"),
        ):
            if wrong:
                raise Refused(why, code)

    # ---------------------------------------------------------------- link streams

    async def _link(self, stream: Stream) -> None:
        try:
            hello = await asyncio.wait_for(stream.receive(), self.limits.hello_s)
        except TimeoutError:
            raise Refused("a link must begin with a hello", FaultCode.MALFORMED) from None
        if hello is None:
            return
        if not isinstance(hello, LinkHello):
            raise Refused("a link must begin with a hello", FaultCode.MALFORMED)
        await self._welcome(hello).feed(stream)

    def _welcome(self, hello: LinkHello) -> HostedSession:
        hosted = self.sessions.get(hello.session)
        if hosted is None:
            raise Refused(f"session {hello.session.hex()[:8]} is not open here", FaultCode.UNKNOWN_SESSION)
        if not secrets.compare_digest(hosted.opened.ticket, hello.ticket):
            raise Refused("the link's ticket is not the one this session was opened with", FaultCode.WRONG_TICKET)
        if hello.version != PROTOCOL_VERSION or hello.epoch != hosted.opened.epoch:
            raise Refused("the link speaks another version or epoch", FaultCode.WRONG_VERSION)
        return hosted


def _class_name(numerics: NumericsClass) -> str:
    return f"weights {numerics.weights[:12]} in {numerics.dtype} (quantization {numerics.quantization})"
