"""One end of a gRPC stream, and how errors are translated between gRPC's status and this project's errors."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from treeswarm.errors import LinkBroken, Malformed, Refused, SwarmError
from treeswarm.protocol.messages import FaultCode, Message
from treeswarm.transport.rate_limit import RateLimiter
from treeswarm.transport.seam import StreamKind, Traffic
from treeswarm.wire.codec import decode_control_down, decode_control_up, decode_link_down, decode_link_up, encode

CODE_KEY = "treeswarm-code"
# gRPC reports to a server that a peer's messages have ended before it reports that the peer has disconnected.
DISCONNECT_WAIT_S = 0.05
# When a call's messages have ended, its status arrives in the same packet or never.
STATUS_WAIT_S = 1.0
# Details that gRPC gives for a write to a stream that its peer has just ended.
CORE_ERROR = "Internal error from Core"
# Exceptions that gRPC raises on a stream that is over.  A server whose peer has just disconnected gets `InternalError`.
STREAM_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
# Number of messages read ahead of the receiver.  Beyond them, HTTP/2 flow control stops the peer.
READ_AHEAD = 16


@dataclass(frozen=True)
class Codec:
    """Functions that turn messages into a stream's bytes, and bytes into messages."""

    encode: Callable[[Any], bytes]
    up: Mapping[StreamKind, Callable[[bytes], Any]]
    """Decoders of what the dialler sends."""
    down: Mapping[StreamKind, Callable[[bytes], Any]]
    """Decoders of what the accepting end sends."""


@dataclass(frozen=True)
class GrpcCall:
    """The RPC under a stream, as either end of it sees it."""

    peer: str
    """Address of the other end."""
    kind: StreamKind
    read: Callable[[], Awaitable[Any]]
    write: Callable[[bytes], Awaitable[None]]
    reason_ended: Callable[[], Awaitable[SwarmError | None]]
    """Returns the error that the call ended with, or None if it ended well.  It may wait for the peer's status."""
    finish: Callable[["GrpcStream"], Awaitable[None]]
    """Ends the call from this end."""


@dataclass(frozen=True)
class _StreamEnd:
    """Last item of a stream's inbox: the stream ended, with an error or without."""

    error: SwarmError | None


@dataclass(eq=False)
class GrpcStream:
    """One end of a stream.

    Reading runs in a task of its own, because cancelling a read cancels the whole RPC.
    """

    call: GrpcCall
    encode: Callable[[Message], bytes]
    decode: Callable[[bytes], Message]
    traffic: Traffic
    rate_limiter: RateLimiter | None = None
    error: SwarmError | None = None
    """Error that the accepting end ended the stream with."""
    ended: bool = False
    _inbox: asyncio.Queue[Message | _StreamEnd] = field(default_factory=lambda: asyncio.Queue(READ_AHEAD))
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _end: _StreamEnd | None = None

    def __post_init__(self) -> None:
        self.reader = asyncio.create_task(self._read_ahead())

    @property
    def peer(self) -> str:
        return self.call.peer

    async def send(self, message: Message) -> None:
        if self.ended:
            raise LinkBroken(f"the stream to {self.peer} has ended")
        data = self.encode(message)
        if self.rate_limiter is not None:
            if self.call.kind is StreamKind.LINK:
                await self.rate_limiter.acquire(len(data))
            else:
                self.rate_limiter.charge(len(data), asyncio.get_running_loop().time())
        writing = asyncio.create_task(self._write(data))
        writing.add_done_callback(_retrieve_exception)
        await asyncio.shield(writing)

    async def receive(self) -> Message | None:
        if self._end is None:
            item = await self._inbox.get()
            if not isinstance(item, _StreamEnd):
                return item
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        return None

    async def end(self, error: Exception | None = None) -> None:
        if self.ended:
            return
        self.ended = True
        self.error = error if isinstance(error, SwarmError) else Refused(str(error)) if error else None
        with contextlib.suppress(*STREAM_ERRORS):
            await self.call.finish(self)

    def break_off(self, error: LinkBroken) -> None:
        """End the stream without waiting for the peer: nothing more will arrive.

        A pending `receive` raises `error`, unless the stream's own end has been delivered already.
        """
        self.ended = True
        if self.reader.done() and not self.reader.cancelled():
            return  # The reader has put the stream's end into the inbox.
        self.reader.cancel()
        while self._inbox.full():
            self._inbox.get_nowait()
        self._inbox.put_nowait(_StreamEnd(error))

    async def _write(self, data: bytes) -> None:
        try:
            async with self._writing:
                await self.call.write(data)
                self.traffic.sent[self.call.kind] += len(data)
        except STREAM_ERRORS as error:
            reason = await self.call.reason_ended()
            raise reason or LinkBroken(f"the stream to {self.peer} broke: {error}") from None

    async def _read_ahead(self) -> None:
        end: _StreamEnd | None = None
        while end is None:
            item: Message | _StreamEnd
            try:
                data = await self.call.read()
                if data is grpc.aio.EOF:
                    item = end = _StreamEnd(await self.call.reason_ended())
                else:
                    self.traffic.received[self.call.kind] += len(data)
                    item = self.decode(data)
            except Malformed as error:
                item = end = _StreamEnd(error)
            except STREAM_ERRORS as error:
                reason = await self.call.reason_ended()
                item = end = _StreamEnd(reason or LinkBroken(f"the stream to {self.peer} broke: {error}"))
            await self._inbox.put(item)


def _retrieve_exception(writing: "asyncio.Task[None]") -> None:
    """Mark a failed write as handled.  If its sender was cancelled meanwhile, asyncio would log the error as a bug."""
    if not writing.cancelled():
        writing.exception()


async def reason_context_ended(context: Any) -> SwarmError | None:
    """Return why a call ended as its accepting end sees it, or None if the dialler ended it well."""
    await asyncio.sleep(DISCONNECT_WAIT_S)
    return LinkBroken("the peer broke the stream") if context.cancelled() else None


def status_of_error(error: BaseException) -> tuple[grpc.StatusCode, str, str]:
    """Translate an error for the peer: return gRPC's status, this project's fault code and the text."""
    text = str(error)[:1000] if isinstance(error, SwarmError) else "internal error"
    if isinstance(error, Malformed):
        return grpc.StatusCode.INVALID_ARGUMENT, FaultCode.MALFORMED.value, text
    code = error.code if isinstance(error, Refused) else FaultCode.INTERNAL.value
    return grpc.StatusCode.FAILED_PRECONDITION, str(code), text


class CallOutcome:
    """How the peer ended a dialled call.

    A write that fails because the call is over replaces the call's status by an error of its own, before or after the
    peer's status arrives.  So every status is noted as it arrives.
    """

    def __init__(self, call: Any, target: str) -> None:
        """Watch `call`, which was dialled to the address `target`."""
        self._target = target
        self._outcome: asyncio.Future[SwarmError | None] = asyncio.get_running_loop().create_future()
        call.add_done_callback(self._note)

    async def __call__(self) -> SwarmError | None:
        """Wait for the outcome.  Return None if the peer ended the call well."""
        done, _ = await asyncio.wait({self._outcome}, timeout=STATUS_WAIT_S)
        return self._outcome.result() if done else LinkBroken(f"the connection to {self._target} broke")

    def _note(self, call: Any) -> None:
        details = _result_now(call.details())
        if details != CORE_ERROR and not self._outcome.done():
            code, metadata = _result_now(call.code()), dict(_result_now(call.trailing_metadata()) or ())
            self._outcome.set_result(_error_of_status(code, details, metadata, self._target))


def _result_now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a finished call knows its status")


def _error_of_status(status: grpc.StatusCode, details: str, metadata: dict[str, Any], target: str) -> SwarmError | None:
    if status is grpc.StatusCode.OK:
        return None
    if status is grpc.StatusCode.INVALID_ARGUMENT:
        return Malformed(details)
    if status is grpc.StatusCode.FAILED_PRECONDITION:
        return Refused(details, _fault_code(metadata.get(CODE_KEY)))
    return LinkBroken(f"the connection to {target} broke ({details or status.name.lower()})")


def _fault_code(code: Any) -> str:
    """Return a peer's fault code, or REFUSED for a code that this release does not know."""
    return str(code) if code in {known.value for known in FaultCode} else FaultCode.REFUSED.value


def last_detail(error: BaseException) -> str:
    """Return the end of gRPC's chain of reasons, which is the one that a user can act on."""
    return str(error.details()).rpartition(": ")[2] if isinstance(error, grpc.aio.AioRpcError) else "cancelled"


MESSAGES = Codec(
    encode,
    up={StreamKind.CONTROL: decode_control_up, StreamKind.LINK: decode_link_up},
    down={StreamKind.CONTROL: decode_control_down, StreamKind.LINK: decode_link_down},
)
