"""The transport seam over gRPC: bidirectional streams of protobuf, HTTP/2 underneath."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc

from treeswarm.errors import BadRequest, LinkBroken, Malformed, Refused, SwarmError, Unreachable
from treeswarm.messages import MAX_MESSAGE_BYTES, FaultCode, Message
from treeswarm.transport.address import Address
from treeswarm.transport.seam import Accept, StreamKind
from treeswarm.wire.codec import decode_control_down, decode_control_up, decode_link_up, encode

PATHS = {StreamKind.CONTROL: "/treeswarm.Swarm/Control", StreamKind.LINK: "/treeswarm.Swarm/Link"}
KINDS = {path: kind for kind, path in PATHS.items()}
CODE_KEY = "treeswarm-code"
CONNECT_S = 5.0
# How long what was sent before an end may take to arrive.
FLUSH_S = 5.0
STOP_GRACE_S = 0.5
# gRPC tells a server that a peer's messages are over before it tells that the peer is gone.
GONE_S = 0.05
# The status of a call whose messages are over is in the same packet, or lost for good.
LAST_WORDS_S = 1.0
# What gRPC says of a write to a stream that its peer has just ended.
CORE_ERROR = "Internal error from Core"
# Messages read ahead of whoever receives; past them HTTP/2 flow control holds the peer back.
READ_AHEAD = 16

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
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
# So that a port in use is an error and not a second server beside the first.
SERVER_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0)]


@dataclass(frozen=True)
class _Over:
    """The last thing a stream's reader says: it ended, well or with an error."""

    error: SwarmError | None


@dataclass(eq=False)
class GrpcStream:
    """One end of a stream.

    Reading runs in a task of its own, because a cancelled read would take the whole RPC with it.
    """

    peer: str
    read: Callable[[], Awaitable[Any]]
    write: Callable[[bytes], Awaitable[None]]
    decode: Callable[[bytes], Message]
    why_over: Callable[[], Awaitable[SwarmError | None]]
    finish: Callable[["GrpcStream"], Awaitable[None]]
    error: SwarmError | None = None
    """What the accepting side ended the stream with."""
    ended: bool = False
    _inbox: asyncio.Queue[Message | _Over] = field(default_factory=lambda: asyncio.Queue(READ_AHEAD))
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _over: _Over | None = None

    def __post_init__(self) -> None:
        self.reader = asyncio.create_task(self._read_ahead())

    async def send(self, message: Message) -> None:
        if self.ended:
            raise LinkBroken(f"the stream to {self.peer} has ended")
        await asyncio.shield(self._write(encode(message)))

    async def receive(self) -> Message | None:
        if self._over is None:
            item = await self._inbox.get()
            if not isinstance(item, _Over):
                return item
            self._over = item
        if self._over.error is not None:
            raise self._over.error
        return None

    async def end(self, error: Exception | None = None) -> None:
        if self.ended:
            return
        self.ended = True
        self.error = error if isinstance(error, SwarmError) else Refused(str(error)) if error else None
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self.finish(self)

    def break_off(self, error: LinkBroken) -> None:
        """The transport knows that the peer is gone."""
        self.ended = True
        self.reader.cancel()
        while self._inbox.full():
            self._inbox.get_nowait()
        self._inbox.put_nowait(_Over(error))

    async def _write(self, data: bytes) -> None:
        try:
            async with self._writing:
                await self.write(data)
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            raise await self.why_over() or LinkBroken(f"the stream to {self.peer} broke: {error}") from None

    async def _read_ahead(self) -> None:
        over: _Over | None = None
        while over is None:
            item: Message | _Over
            try:
                data = await self.read()
                item = over = _Over(await self.why_over()) if data is grpc.aio.EOF else None  # type: ignore[assignment]
                if over is None:
                    item = self.decode(data)
            except Malformed as error:
                item = over = _Over(error)
            except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
                item = over = _Over(await self.why_over() or LinkBroken(f"the stream to {self.peer} broke: {error}"))
            await self._inbox.put(item)


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


@dataclass(eq=False)
class GrpcTransport:
    """Dials and listens.  Control and link streams to one address use connections of their own."""

    connect_s: float = CONNECT_S
    _channels: dict[tuple[str, StreamKind], grpc.aio.Channel] = field(default_factory=dict)
    _streams: set[GrpcStream] = field(default_factory=set)
    _endings: set[asyncio.Task[None]] = field(default_factory=set)

    async def connect(self, address: str, kind: StreamKind) -> GrpcStream:
        target = str(Address.parse(address))
        call = self._channel(target, kind).stream_stream(PATHS[kind])()
        last_words = _LastWords(call, target)
        try:
            await asyncio.wait_for(call.wait_for_connection(), self.connect_s)
        except (grpc.RpcError, TimeoutError, asyncio.CancelledError) as error:
            ours = isinstance(error, asyncio.CancelledError) and not call.done()  # else gRPC cancelled the call
            call.cancel()
            if ours:
                raise
            why = "no answer in time" if isinstance(error, TimeoutError) else _details(error)
            raise Unreachable(
                f"nobody answers at {target} ({why}): check the address, that the node runs, and any firewall between"
            ) from None
        stream = GrpcStream(
            peer=target,
            read=call.read,
            write=call.write,
            decode=decode_control_down if kind is StreamKind.CONTROL else _no_message,
            why_over=last_words,
            finish=lambda stream: self._hang_up(call, stream),
        )
        self._streams.add(stream)
        return stream

    async def listen(self, address: str, accept: Accept) -> GrpcListener:
        wanted = Address.parse(address)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handler = _Handler(accept)
        server.add_generic_rpc_handlers((handler,))
        try:
            port = server.add_insecure_port(str(wanted))
        except RuntimeError:
            port = 0
        if port == 0:
            await server.stop(None)
            raise BadRequest(
                f"cannot listen on {wanted}: the port is in use or the address is not this machine's; "
                "choose another with --listen HOST:PORT, port 0 for a free one"
            )
        await server.start()
        return GrpcListener(str(Address(wanted.host, port)), server, handler.accepted)

    async def close(self) -> None:
        for ending in list(self._endings):
            ending.cancel()
        await asyncio.gather(*self._endings, return_exceptions=True)
        for stream in list(self._streams):
            stream.ended = True
            stream.reader.cancel()
        await asyncio.gather(*(stream.reader for stream in self._streams), return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        self._streams.clear()
        self._channels.clear()

    def _channel(self, target: str, kind: StreamKind) -> grpc.aio.Channel:
        if (target, kind) not in self._channels:
            self._channels[target, kind] = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        return self._channels[target, kind]

    async def _hang_up(self, call: Any, stream: GrpcStream) -> None:
        """Say goodbye, leave the call to finish in the background, and drop it if it does not."""
        await call.done_writing()
        ending = asyncio.create_task(self._see_off(call, stream))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _see_off(self, call: Any, stream: GrpcStream) -> None:
        try:
            await asyncio.wait_for(call.code(), FLUSH_S)
        except TimeoutError:
            pass
        finally:
            call.cancel()
            stream.reader.cancel()
            self._streams.discard(stream)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Hands every accepted stream to `accept`, and turns what it raises into the stream's end."""

    def __init__(self, accept: Accept) -> None:
        self._accept = accept
        self.accepted: set[asyncio.Task[None]] = set()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        kind = KINDS.get(details.method)
        if kind is None:
            return None

        async def serve(_: Any, context: grpc.aio.ServicerContext) -> None:
            await self._serve(kind, context)

        return grpc.stream_stream_rpc_method_handler(serve)

    async def _serve(self, kind: StreamKind, context: Any) -> None:
        await context.send_initial_metadata(())
        stream = GrpcStream(
            peer=str(context.peer()).removeprefix("ipv4:").removeprefix("ipv6:"),
            read=context.read,
            write=context.write,
            decode=decode_control_up if kind is StreamKind.CONTROL else decode_link_up,
            why_over=lambda: _why_context_ended(context),
            finish=lambda _: _cancel_other(accepted),
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
        error = stream.error or (None if accepted.cancelled() else accepted.exception())
        if error is not None and not isinstance(error, LinkBroken):
            await _abort(context, error)


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


async def _abort(context: Any, error: BaseException) -> None:
    if not isinstance(error, SwarmError):
        _report_bug(error)
    status = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, Malformed) else grpc.StatusCode.FAILED_PRECONDITION
    code = error.code if isinstance(error, Refused) else "malformed" if isinstance(error, Malformed) else "internal"
    text = str(error) if isinstance(error, SwarmError) else "internal error"
    await context.abort(status, text[:1000], trailing_metadata=((CODE_KEY, str(code)),))


async def _why_context_ended(context: Any) -> SwarmError | None:
    await asyncio.sleep(GONE_S)
    return LinkBroken("the peer broke the stream") if context.cancelled() else None


class _LastWords:
    """What the peer ended a call with.

    A write that fails because the call is over replaces the call's status by an error of its own, before or after the
    peer's status arrives; so every status is noted as it comes.
    """

    def __init__(self, call: Any, target: str) -> None:
        self._target = target
        self._heard: asyncio.Future[SwarmError | None] = asyncio.get_running_loop().create_future()
        call.add_done_callback(self._note)

    async def __call__(self) -> SwarmError | None:
        """Waits for them.  None: the peer ended well."""
        done, _ = await asyncio.wait({self._heard}, timeout=LAST_WORDS_S)
        return self._heard.result() if done else LinkBroken(f"the connection to {self._target} broke")

    def _note(self, call: Any) -> None:
        details = _at_once(call.details())
        if details != CORE_ERROR and not self._heard.done():
            said = (_at_once(call.code()), details, dict(_at_once(call.trailing_metadata()) or ()))
            self._heard.set_result(_why_call_ended(*said, self._target))


def _at_once(asked: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        asked.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a finished call knows its status")


def _why_call_ended(status: grpc.StatusCode, details: str, metadata: dict[str, Any], target: str) -> SwarmError | None:
    if status is grpc.StatusCode.OK:
        return None
    if status is grpc.StatusCode.INVALID_ARGUMENT:
        return Malformed(details)
    if status is grpc.StatusCode.FAILED_PRECONDITION:
        return Refused(details, _known_code(metadata.get(CODE_KEY)))
    return LinkBroken(f"the connection to {target} broke ({details or status.name.lower()})")


def _known_code(code: Any) -> str:
    """A peer's code, or what stands for one we do not know."""
    return str(code) if code in {known.value for known in FaultCode} else FaultCode.REFUSED.value


def _details(error: BaseException) -> str:
    """The end of gRPC's chain of reasons, which is the one that a user can act on."""
    return str(error.details()).rpartition(": ")[2] if isinstance(error, grpc.aio.AioRpcError) else "cancelled"


def _no_message(data: bytes) -> Message:
    raise Malformed(f"{len(data)} bytes up a link, which carries nothing upstream")
