"""The transport seam over gRPC: bidirectional streams of protobuf, HTTP/2 underneath, TLS around it."""

import asyncio
import contextlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc

from treeswarm.errors import BadRequest, Impostor, LinkBroken, Refused, SwarmError, Unreachable
from treeswarm.keys import SERVER_NAME
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import MAX_MESSAGE_BYTES
from treeswarm.transport.grpc_streams import (
    CODE_KEY,
    LAST_WORDS_S,
    MESSAGES,
    CallOutcome,
    Codec,
    GrpcStream,
    last_detail,
    reason_context_ended,
    status_of_error,
)
from treeswarm.transport.rate_limit import RateLimiter
from treeswarm.transport.seam import Accept, StreamKind, Traffic
from treeswarm.transport.tls import (
    Certificate,
    Role,
    Security,
    check_pin,
    fetch_certificate,
    unreachable,
)

log = logging.getLogger(__name__)

PATHS = {StreamKind.CONTROL: "/treeswarm.Swarm/Control", StreamKind.LINK: "/treeswarm.Swarm/Link"}
KINDS = {path: kind for kind, path in PATHS.items()}
CONNECT_S = 5.0
# How long what was sent before an end may take to arrive.
FLUSH_S = 5.0
STOP_GRACE_S = 0.5

OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Home routers forget idle connections within minutes; these find a dead one in 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]
CHANNEL_OPTIONS = [
    *OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Despite its name, how long one attempt may take: at 200 ms, a peer whose handshake took 300 ms was out of reach.
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),
    # Without it, channels to one address share a connection, and bulk queues in front of control.
    ("grpc.use_local_subchannel_pool", 1),
]
SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # So that a port in use is an error and not a second server beside the first.
    ("grpc.so_reuseport", 0),
    # Whoever connects and says nothing holds a socket no longer than this; gRPC's own patience is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
]


@dataclass(eq=False)
class GrpcListener:
    """An open port."""

    address: str
    server: grpc.aio.Server
    accepted: set[asyncio.Task[None]]

    async def close(self) -> None:
        await self.server.stop(grace=STOP_GRACE_S)
        for task in list(self.accepted):
            task.cancel()
        await asyncio.gather(*self.accepted, return_exceptions=True)


# Connections kept for later to peers that nothing is said to at the moment; a node speaks to some dozens.
MAX_CHANNELS = 256


@dataclass(eq=False)
class GrpcTransport:
    """Dials and listens.  Control and link streams to one address use connections of their own."""

    connect_s: float = CONNECT_S
    security: Security | None = None
    """None: plaintext, for tests and measurements."""
    codec: Codec = MESSAGES
    send_limit: int = MAX_MESSAGE_BYTES
    """The largest message that a dialled stream takes."""
    refused: Counter[str] = field(default_factory=Counter)
    """Peers turned away, by code: streams accepted and then ended with an error, and dialled peers that were not who
    they should be."""
    traffic: Traffic = field(default_factory=Traffic)
    rate_limiter: RateLimiter | None = None
    """Of what is sent: links wait their turn; control streams, which are heartbeats and answers, count and do not."""
    _certificates: dict[str, Certificate] = field(default_factory=dict)
    _pins: dict[str, str] = field(default_factory=dict)
    _channels: dict[tuple[str, StreamKind, str], grpc.aio.Channel] = field(default_factory=dict)
    _streams: set[GrpcStream] = field(default_factory=set)
    _endings: set[asyncio.Task[None]] = field(default_factory=set)
    _closed: bool = False

    async def connect(self, address: str, kind: StreamKind) -> GrpcStream:
        wanted = Address.parse(address)
        known = wanted.bare in self._certificates
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            return await self._dial(wanted, kind)
        except Unreachable:
            if not known or loop.time() - started > self.connect_s:
                raise
        return await self._dial(wanted, kind)  # it may have been started anew, with another certificate

    def pin_seen(self, address: str) -> str | None:
        """The pin of who answered at an address the last time it was dialled; None before, and without TLS."""
        return self._pins.get(Address.parse(address).bare)

    async def listen(self, address: str, accept: Accept) -> GrpcListener:
        wanted = Address.parse(address)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handler = _Handler(accept, self.codec, self.security, self.refused, self.traffic, self.rate_limiter)
        server.add_generic_rpc_handlers((handler,))
        try:
            port = _add_port(server, wanted.bare, self.security)
        except RuntimeError:
            port = 0
        if port == 0:
            await server.stop(None)
            raise BadRequest(
                f"cannot listen on {wanted.bare}: the port is in use or the address is not this machine's; "
                "choose another with --listen HOST:PORT, port 0 for a free one"
            )
        await server.start()
        return GrpcListener(Address(wanted.host, port).bare, server, handler.accepted)

    async def close(self) -> None:
        self._closed = True
        for ending in list(self._endings):
            ending.cancel()
        await asyncio.gather(*self._endings, return_exceptions=True)
        for stream in list(self._streams):
            stream.break_off(LinkBroken(f"the stream to {stream.peer} ended: its transport was closed"))
        await asyncio.gather(*(stream.reader for stream in self._streams), return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        self._streams.clear()
        self._channels.clear()

    async def _dial(self, address: Address, kind: StreamKind) -> GrpcStream:
        target = address.bare
        self._check_open(target)
        certificate = await self._certificate_of(address) if self.security else None
        proof = self.security.proof(Role.DIALLER, certificate.pin) if self.security and certificate else ()
        call = self._channel(target, kind, certificate).stream_stream(PATHS[kind])(metadata=proof)
        last_words = CallOutcome(call, target)
        try:
            await asyncio.wait_for(call.wait_for_connection(), self.connect_s)
        except (grpc.RpcError, TimeoutError, asyncio.CancelledError) as error:
            ours = isinstance(error, asyncio.CancelledError) and not call.done()  # else gRPC cancelled the call
            call.cancel()
            if ours:
                raise
            self._certificates.pop(target, None)
            said = await last_words()
            if isinstance(said, Refused):
                raise said from None
            raise unreachable(
                target, "no answer in time" if isinstance(error, TimeoutError) else last_detail(error)
            ) from None
        if proof and certificate:
            await self._check_acceptor(call, last_words, target, certificate)
        stream = GrpcStream(
            peer=target,
            read=call.read,
            write=call.write,
            encode=self.codec.encode,
            decode=self.codec.down[kind],
            why_over=last_words,
            finish=lambda stream: self._hang_up(call, stream),
            kind=kind,
            traffic=self.traffic,
            rate_limiter=self.rate_limiter,
        )
        self._streams.add(stream)
        return stream

    async def _certificate_of(self, address: Address) -> Certificate:
        """Raises Impostor when it is not the pinned one, Unreachable."""
        known = self._certificates.get(address.bare)
        if known is not None and address.pin in {"", known.pin}:
            return known
        shown = await fetch_certificate(address, self.connect_s)
        try:
            check_pin(address, shown)
        except Impostor:
            self.refused["impostor"] += 1
            raise
        before = self._pins.get(address.bare, shown.pin)
        if shown.pin != before and not address.pin:
            log.warning(
                "%s answers with the key %s, earlier with %s: it was set up anew, or a machine in the middle answers; "
                "name the node as HOST:PORT#PIN to be sure",
                *(address.bare, shown.pin, before),
            )
        self._certificates[address.bare] = shown
        self._pins[address.bare] = shown.pin
        return shown

    async def _check_acceptor(self, call: Any, last_words: CallOutcome, target: str, certificate: Certificate) -> None:
        """Say nothing to a node that does not know the swarm's key.  Raises Refused, Unreachable."""
        assert self.security is not None
        try:
            answer = await asyncio.wait_for(call.initial_metadata(), self.connect_s)
            self.security.check_acceptor(target, certificate.pin, dict(answer))
        except TimeoutError:
            call.cancel()
            raise unreachable(target, "no answer in time") from None
        except Refused:
            said = await last_words()
            if call.done() and said is not None:
                raise said from None
            call.cancel()
            self.refused["wrong-swarm-key"] += 1
            raise
        except BaseException:
            call.cancel()
            raise

    def _check_open(self, target: str) -> None:
        """Whoever is woken by `close` may want his peer back: what he dialled then nobody would ever close."""
        if self._closed:
            raise Unreachable(f"{target} is not dialled: this transport was closed")

    def _channel(self, target: str, kind: StreamKind, certificate: Certificate | None) -> grpc.aio.Channel:
        self._check_open(target)  # it may have been closed while the certificate was fetched
        key = (target, kind, certificate.pin if certificate else "")
        channel = self._channels.pop(key, None) or self._new_channel(target, certificate)
        self._channels[key] = channel  # the latest used stand last
        self._forget_old()
        return channel

    def _new_channel(self, target: str, certificate: Certificate | None) -> grpc.aio.Channel:
        options = [*CHANNEL_OPTIONS, ("grpc.max_send_message_length", self.send_limit)]
        if certificate is None:
            return grpc.aio.insecure_channel(target, options=options)
        options.append(("grpc.ssl_target_name_override", SERVER_NAME))
        only = grpc.ssl_channel_credentials(root_certificates=certificate.pem)
        return grpc.aio.secure_channel(target, only, options=options)

    def _forget_old(self) -> None:
        """Whoever opens a session names the next hop: a stranger must not fill this machine with connections."""
        in_use = {stream.peer for stream in self._streams}
        idle = [key for key in self._channels if key[0] not in in_use]
        for key in idle[: max(0, len(self._channels) - MAX_CHANNELS)]:
            target = key[0]
            self._certificates.pop(target, None)
            self._pins.pop(target, None)
            ending = asyncio.create_task(self._channels.pop(key).close())
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def _hang_up(self, call: Any, stream: GrpcStream) -> None:
        """Say goodbye, leave the call to finish in the background, and drop it if it does not."""
        await call.done_writing()
        ending = asyncio.create_task(self._see_off(call, stream))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _see_off(self, call: Any, stream: GrpcStream) -> None:
        try:
            await asyncio.wait_for(call.code(), FLUSH_S)
            # The status is here; the reader may be a turn of the loop away from telling of it.
            await asyncio.wait({stream.reader}, timeout=LAST_WORDS_S)
        except TimeoutError:
            pass
        finally:
            call.cancel()
            stream.break_off(LinkBroken(f"{stream.peer} did not end the stream"))
            self._streams.discard(stream)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Hands every accepted stream to `accept`, and turns what it raises into the stream's end."""

    def __init__(
        self,
        accept: Accept,
        codec: Codec,
        security: Security | None,
        refused: Counter[str],
        traffic: Traffic,
        rate_limiter: RateLimiter | None,
    ) -> None:
        self._accept, self._codec, self._security = accept, codec, security
        self._refused, self._traffic, self._pace = refused, traffic, rate_limiter
        self.accepted: set[asyncio.Task[None]] = set()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        kind = KINDS.get(details.method)
        if kind is None:
            return None

        async def serve(_: Any, context: grpc.aio.ServicerContext) -> None:
            await self._serve(kind, context)

        return grpc.stream_stream_rpc_method_handler(serve)

    async def _serve(self, kind: StreamKind, context: Any) -> None:
        try:
            await context.send_initial_metadata(self._proof(context))
        except Refused as error:
            await self._abort(context, error)
        stream = GrpcStream(
            # gRPC writes an IPv6 host's brackets as %5B and %5D.
            peer=unquote(str(context.peer())).removeprefix("ipv4:").removeprefix("ipv6:"),
            read=context.read,
            write=context.write,
            encode=self._codec.encode,
            decode=self._codec.up[kind],
            why_over=lambda: reason_context_ended(context),
            finish=lambda _: _cancel_other(accepted),
            kind=kind,
            traffic=self._traffic,
            rate_limiter=self._pace,
        )
        accepted: asyncio.Task[None] = asyncio.create_task(_accepting(self._accept, kind, stream))
        self.accepted.add(accepted)
        accepted.add_done_callback(self.accepted.discard)
        try:
            await asyncio.wait({accepted})
        except asyncio.CancelledError:
            # The peer is gone.  That ends the stream, not whoever serves it: a session outlives its stream.
            stream.break_off(LinkBroken(f"the peer {stream.peer} broke the stream"))
            accepted.add_done_callback(_tell_of_bugs)
            raise
        stream.ended = True
        stream.reader.cancel()
        await asyncio.gather(stream.reader, return_exceptions=True)
        why = stream.error or (None if accepted.cancelled() else accepted.exception())
        if why is not None and not isinstance(why, LinkBroken):
            await self._abort(context, why)

    def _proof(self, context: Any) -> tuple[tuple[str, str], ...]:
        """For a caller of this swarm, that this node is of it too.  Raises Refused for any other caller."""
        if self._security is None:
            return ()
        self._security.check_dialler(dict(context.invocation_metadata() or ()))
        return self._security.proof(Role.ACCEPTOR, self._security.listener_identity().pin)

    async def _abort(self, context: Any, error: BaseException) -> None:
        if not isinstance(error, SwarmError):
            _report_bug(error)
        status, code, text = status_of_error(error)
        self._refused[code] += 1
        with contextlib.suppress(grpc.aio.InternalError):  # the peer did not wait for an answer
            await context.abort(status, text, trailing_metadata=((CODE_KEY, code),))


def _add_port(server: grpc.aio.Server, address: str, security: Security | None) -> int:
    """The port bound; 0 or RuntimeError where that fails."""
    if security is None:
        return int(server.add_insecure_port(address))
    identity = security.listener_identity()
    credentials = grpc.ssl_server_credentials([(identity.key_pem, identity.certificate_pem)])
    return int(server.add_secure_port(address, credentials))


async def _accepting(accept: Accept, kind: StreamKind, stream: GrpcStream) -> None:
    await accept(kind, stream)


def _tell_of_bugs(task: "asyncio.Task[None]") -> None:
    """Nobody is left to hear how a handler ended; only its bugs are news."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, SwarmError):
        _report_bug(error)


def _report_bug(error: BaseException) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": "a stream's handler failed", "exception": error})


async def _cancel_other(task: "asyncio.Task[None]") -> None:
    if task is not asyncio.current_task():
        task.cancel()
