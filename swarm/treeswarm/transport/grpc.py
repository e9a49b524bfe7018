"""The transport over gRPC: bidirectional streams of protobuf messages over HTTP/2, protected by TLS."""

import asyncio
import contextlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc

from treeswarm.errors import BadRequest, Impostor, LinkBroken, Refused, SwarmError, Unreachable
from treeswarm.protocol.address import Address, host_of
from treeswarm.protocol.messages import MAX_MESSAGE_BYTES
from treeswarm.tasks import TaskSet
from treeswarm.transport.grpc_channels import CONNECT_S, SERVER_OPTIONS, ChannelCache
from treeswarm.transport.grpc_streams import (
    CODE_KEY,
    MESSAGES,
    STATUS_WAIT_S,
    CallOutcome,
    Codec,
    GrpcCall,
    GrpcStream,
    last_detail,
    reason_context_ended,
    status_of_error,
)
from treeswarm.transport.rate_limit import RateLimiter
from treeswarm.transport.seam import Accept, StreamKind, Traffic
from treeswarm.transport.tls import (
    PROOF_KEY,
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
# Seconds that messages sent before the end of a stream may take to arrive.
FLUSH_S = 5.0
STOP_GRACE_S = 0.5
# A machine with another swarm key may dial every few seconds, and be one of many.
REPORT_EVERY_S = 300.0
MAX_REPORTED = 64


@dataclass(eq=False)
class GrpcListener:
    """An open port."""

    address: str
    server: grpc.aio.Server
    accepted: TaskSet
    """Tasks that serve the accepted streams."""

    async def close(self) -> None:
        await self.server.stop(grace=STOP_GRACE_S)
        await self.accepted.close()


@dataclass(eq=False)
class GrpcTransport:
    """Dials and listens.  Control and link streams to one address use separate connections."""

    connect_s: float = CONNECT_S
    """Seconds that connecting may take."""
    security: Security | None = None
    """Keys for TLS, or None for plaintext (tests and measurements)."""
    codec: Codec = MESSAGES
    send_limit: int = MAX_MESSAGE_BYTES
    """Size in bytes of the largest message that a dialled stream sends."""
    refused: Counter[str] = field(default_factory=Counter)
    """Number of rejected peers by code: accepted streams that ended with an error, and dialled peers whose key was
    not the expected one."""
    traffic: Traffic = field(default_factory=Traffic)
    rate_limiter: RateLimiter | None = None
    """Limit on what is sent, or None.  Link streams wait for their turn.  Control streams, which carry heartbeats and
    answers, are counted and do not wait."""
    _cache: ChannelCache = field(default_factory=ChannelCache)
    _streams: set[GrpcStream] = field(default_factory=set)
    """Dialled streams that have not ended."""
    _closing: TaskSet = field(default_factory=TaskSet)
    """Tasks that close channels and ended streams."""

    async def connect(self, address: str, kind: StreamKind) -> GrpcStream:
        parsed = Address.parse(address)
        has_certificate = parsed.bare in self._cache.certificates
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            return await self._dial(parsed, kind)
        except Unreachable:
            if not has_certificate or loop.time() - start > self.connect_s:
                raise
        return await self._dial(parsed, kind)  # The node may have been restarted with another certificate.

    async def listen(self, address: str, accept: Accept) -> GrpcListener:
        parsed = Address.parse(address)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handler = _Handler(self, accept)
        server.add_generic_rpc_handlers((handler,))
        try:
            port = _add_port(server, parsed.bare, self.security)
        except RuntimeError:
            port = 0
        if port == 0:
            await server.stop(None)
            raise BadRequest(
                f"cannot listen on {parsed.bare}: the port is in use or the address is not this machine's; "
                "choose another with --listen HOST:PORT, port 0 for a free one"
            )
        await server.start()
        return GrpcListener(Address(parsed.host, port).bare, server, handler.accepted)

    async def close(self) -> None:
        self._cache.closed = True
        await self._closing.close()
        for stream in list(self._streams):
            stream.break_off(LinkBroken(f"the stream to {stream.peer} ended: its transport was closed"))
        await asyncio.gather(*(stream.reader for stream in self._streams), return_exceptions=True)
        self._streams.clear()
        await self._cache.close()

    async def _dial(self, address: Address, kind: StreamKind) -> GrpcStream:
        target = address.bare
        self._cache.check_open(target)
        certificate = await self._certificate_of(address) if self.security else None
        proof = self.security.proof(Role.DIALLER, certificate.pin) if self.security and certificate else ()
        channel = self._cache.channel(target, kind, certificate, self.send_limit)
        self._evict_idle()
        call = channel.stream_stream(PATHS[kind])(metadata=proof)
        outcome = CallOutcome(call, target)
        try:
            await asyncio.wait_for(call.wait_for_connection(), self._cache.connect_s(target, self.connect_s))
        except (grpc.RpcError, TimeoutError, asyncio.CancelledError) as error:
            # gRPC raises CancelledError as well, when it cancels the call itself.
            task_cancelled = isinstance(error, asyncio.CancelledError) and not call.done()
            call.cancel()
            if task_cancelled:
                raise
            self._cache.note_connected(target, late=isinstance(error, TimeoutError))
            self._cache.certificates.pop(target, None)
            reason = await outcome()
            if isinstance(reason, Refused):
                raise reason from None
            raise unreachable(
                target, "no answer in time" if isinstance(error, TimeoutError) else last_detail(error)
            ) from None
        self._cache.note_connected(target, late=False)
        if proof and certificate:
            await self._check_acceptor(call, outcome, target, certificate)
        stream = GrpcStream(
            GrpcCall(
                peer=target,
                kind=kind,
                read=call.read,
                write=call.write,
                reason_ended=outcome,
                finish=lambda stream: self._hang_up(call, stream),
            ),
            encode=self.codec.encode,
            decode=self.codec.down[kind],
            traffic=self.traffic,
            rate_limiter=self.rate_limiter,
        )
        self._streams.add(stream)
        return stream

    async def _certificate_of(self, address: Address) -> Certificate:
        """Return the certificate to trust at an address.  Raises Unreachable, and Impostor if it has another pin."""
        cached = self._cache.certificates.get(address.bare)
        if cached is not None and address.admits(cached.pin):
            return cached
        certificate = await self._fetch_certificate(address)
        try:
            check_pin(address, certificate)
        except Impostor:
            self.refused["impostor"] += 1
            raise
        earlier_pin = self._cache.pins.get(address.bare, certificate.pin)
        if certificate.pin != earlier_pin and not address.pin:
            log.warning(
                "%s answers with the key %s, earlier with %s: the node was set up anew, or a machine in the middle "
                "answers; to rule that out, give the address as HOST:PORT#PIN",
                *(address.bare, certificate.pin, earlier_pin),
            )
        self._cache.certificates[address.bare] = certificate
        self._cache.pins[address.bare] = certificate.pin
        return certificate

    async def _fetch_certificate(self, address: Address) -> Certificate:
        within_s, loop = self._cache.connect_s(address.bare, self.connect_s), asyncio.get_running_loop()
        began = loop.time()
        try:
            return await fetch_certificate(address, within_s)
        except Unreachable:
            self._cache.note_connected(address.bare, late=loop.time() - began >= within_s)
            raise

    async def _check_acceptor(self, call: Any, outcome: CallOutcome, target: str, certificate: Certificate) -> None:
        """Cancel the call, before anything is sent, to a node that does not know the private swarm's key.

        Raises Refused, Unreachable.
        """
        assert self.security is not None
        try:
            metadata = await asyncio.wait_for(call.initial_metadata(), self.connect_s)
            self.security.check_acceptor(target, certificate.pin, dict(metadata))
        except TimeoutError:
            call.cancel()
            raise unreachable(target, "no answer in time") from None
        except Refused:
            reason = await outcome()
            if call.done() and reason is not None:
                raise reason from None
            call.cancel()
            self.refused["wrong-swarm-key"] += 1
            raise
        except BaseException:
            call.cancel()
            raise

    def _evict_idle(self) -> None:
        for channel in self._cache.evict_idle({stream.peer for stream in self._streams}):
            self._closing.start(channel.close())

    async def _hang_up(self, call: Any, stream: GrpcStream) -> None:
        """End this side of the call, and let a background task wait for the other side."""
        await call.done_writing()
        self._closing.start(self._wait_for_end(call, stream))

    async def _wait_for_end(self, call: Any, stream: GrpcStream) -> None:
        """Wait until the peer has ended the call too, then drop it; drop it after `FLUSH_S` seconds in any case."""
        try:
            await asyncio.wait_for(call.code(), FLUSH_S)
            # The status has arrived; the reader may need one more turn of the event loop to deliver it.
            await asyncio.wait({stream.reader}, timeout=STATUS_WAIT_S)
        except TimeoutError:
            pass
        finally:
            call.cancel()
            stream.break_off(LinkBroken(f"{stream.peer} did not end the stream"))
            self._streams.discard(stream)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Hands every accepted stream to `accept`, and ends the stream with the error that `accept` raises."""

    def __init__(self, transport: GrpcTransport, accept: Accept) -> None:
        self._transport, self._accept = transport, accept
        self.accepted = TaskSet()
        self._reported: dict[str, float] = {}
        """Time, by the event loop's clock, of the last message about each host with another swarm key."""

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
            GrpcCall(
                peer=_peer_of(context),
                kind=kind,
                read=context.read,
                write=context.write,
                reason_ended=lambda: reason_context_ended(context),
                finish=lambda _: _cancel_other(accepted),
            ),
            encode=self._transport.codec.encode,
            decode=self._transport.codec.up[kind],
            traffic=self._transport.traffic,
            rate_limiter=self._transport.rate_limiter,
        )
        accepted = self.accepted.start(_await_accept(self._accept, kind, stream))
        try:
            await asyncio.wait({accepted})
        except asyncio.CancelledError:
            # The peer has disconnected.  That ends the stream, but not the task that serves it: a session outlives its
            # stream.
            stream.break_off(LinkBroken(f"the peer {stream.peer} broke the stream"))
            accepted.add_done_callback(_report_if_bug)
            raise
        stream.ended = True
        stream.reader.cancel()
        await asyncio.gather(stream.reader, return_exceptions=True)
        reason = stream.error or (None if accepted.cancelled() else accepted.exception())
        if reason is not None and not isinstance(reason, LinkBroken):
            await self._abort(context, reason)

    def _proof(self, context: Any) -> tuple[tuple[str, str], ...]:
        """Return the metadata that proves to a member of this private swarm that this node is a member too.

        Raises Refused for a caller that is not a member.
        """
        security = self._transport.security
        if security is None:
            return ()
        metadata = dict(context.invocation_metadata() or ())
        try:
            security.check_dialler(metadata)
        except Refused as error:
            self._report(context, f"refused {{}}: {error}")
            raise
        if security.swarm_key is None and PROOF_KEY in metadata:
            self._report(context, "{} belongs to a private swarm and refuses this node: start it with --swarm-key PATH")
        return security.proof(Role.ACCEPTOR, security.listener_identity().pin)

    def _report(self, context: Any, what: str) -> None:
        """Tell the owner about a caller with another swarm key, whose host replaces `{}`, once per REPORT_EVERY_S."""
        host, now = host_of(_peer_of(context)), asyncio.get_running_loop().time()
        self._reported = {host: at for host, at in self._reported.items() if now - at < REPORT_EVERY_S}
        if host not in self._reported and len(self._reported) < MAX_REPORTED:
            self._reported[host] = now
            log.warning("%s", what.replace("{}", host, 1))

    async def _abort(self, context: Any, error: BaseException) -> None:
        if not isinstance(error, SwarmError):
            _report_bug(error)
        status, code, text = status_of_error(error)
        self._transport.refused[code] += 1
        with contextlib.suppress(grpc.aio.InternalError):  # The peer did not wait for an answer.
            await context.abort(status, text, trailing_metadata=((CODE_KEY, code),))


def _peer_of(context: Any) -> str:
    # gRPC writes the brackets of an IPv6 host as %5B and %5D.
    return unquote(str(context.peer())).removeprefix("ipv4:").removeprefix("ipv6:")


def _add_port(server: grpc.aio.Server, address: str, security: Security | None) -> int:
    """Bind `address` and return the port.  On failure, return 0 or raise RuntimeError."""
    if security is None:
        return int(server.add_insecure_port(address))
    identity = security.listener_identity()
    credentials = grpc.ssl_server_credentials([(identity.key_pem, identity.certificate_pem)])
    return int(server.add_secure_port(address, credentials))


async def _await_accept(accept: Accept, kind: StreamKind, stream: GrpcStream) -> None:
    await accept(kind, stream)


def _report_if_bug(task: "asyncio.Task[None]") -> None:
    """Report an error that is not a SwarmError; other errors have no peer left to be sent to."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, SwarmError):
        _report_bug(error)


def _report_bug(error: BaseException) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": "a stream's handler failed", "exception": error})


async def _cancel_other(task: "asyncio.Task[None]") -> None:
    if task is not asyncio.current_task():
        task.cancel()
