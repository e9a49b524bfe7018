"""One end of a gRPC stream, and what its peer's last words mean."""

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
# gRPC tells a server that a peer's messages are over before it tells that the peer is gone.
GONE_S = 0.05
# The status of a call whose messages are over is in the same packet, or lost for good.
LAST_WORDS_S = 1.0
# What gRPC says of a write to a stream that its peer has just ended.
CORE_ERROR = "Internal error from Core"
# What gRPC raises where a stream is over; a server whose peer has just gone gets `InternalError`.
STREAM_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
# Messages read ahead of whoever receives; past them HTTP/2 flow control holds the peer back.
READ_AHEAD = 16


@dataclass(frozen=True)
class Codec:
    """What the bytes of a stream are at its ends."""

    encode: Callable[[Any], bytes]
    up: Mapping[StreamKind, Callable[[bytes], Any]]
    """From the dialler."""
    down: Mapping[StreamKind, Callable[[bytes], Any]]


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
    encode: Callable[[Message], bytes]
    decode: Callable[[bytes], Message]
    why_over: Callable[[], Awaitable[SwarmError | None]]
    finish: Callable[["GrpcStream"], Awaitable[None]]
    kind: StreamKind
    traffic: Traffic
    rate_limiter: RateLimiter | None = None
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
        data = self.encode(message)
        if self.rate_limiter is not None:
            if self.kind is StreamKind.LINK:
                await self.rate_limiter.acquire(len(data))
            else:
                self.rate_limiter.charge(len(data), asyncio.get_running_loop().time())
        writing = asyncio.create_task(self._write(data))
        writing.add_done_callback(_heard)
        await asyncio.shield(writing)

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
        with contextlib.suppress(*STREAM_ERRORS):
            await self.finish(self)

    def break_off(self, error: LinkBroken) -> None:
        """The transport knows that nothing more comes; whoever waits for a message hears so, if he has not yet."""
        self.ended = True
        if self.reader.done() and not self.reader.cancelled():
            return  # it has told of the end
        self.reader.cancel()
        while self._inbox.full():
            self._inbox.get_nowait()
        self._inbox.put_nowait(_Over(error))

    async def _write(self, data: bytes) -> None:
        try:
            async with self._writing:
                await self.write(data)
                self.traffic.sent[self.kind] += len(data)
        except STREAM_ERRORS as error:
            raise await self.why_over() or LinkBroken(f"the stream to {self.peer} broke: {error}") from None

    async def _read_ahead(self) -> None:
        over: _Over | None = None
        while over is None:
            item: Message | _Over
            try:
                data = await self.read()
                item = over = _Over(await self.why_over()) if data is grpc.aio.EOF else None  # type: ignore[assignment]
                if over is None:
                    self.traffic.received[self.kind] += len(data)
                    item = self.decode(data)
            except Malformed as error:
                item = over = _Over(error)
            except STREAM_ERRORS as error:
                item = over = _Over(await self.why_over() or LinkBroken(f"the stream to {self.peer} broke: {error}"))
            await self._inbox.put(item)


def _heard(writing: "asyncio.Task[None]") -> None:
    """How a write failed whose sender has gone meanwhile is nobody's news; asyncio would log it as a bug."""
    if not writing.cancelled():
        writing.exception()


async def reason_context_ended(context: Any) -> SwarmError | None:
    """What an accepting end's silence means."""
    await asyncio.sleep(GONE_S)
    return LinkBroken("the peer broke the stream") if context.cancelled() else None


def status_of_error(error: BaseException) -> tuple[grpc.StatusCode, str, str]:
    """How an error is put to the peer: gRPC's status, our code, words."""
    text = str(error)[:1000] if isinstance(error, SwarmError) else "internal error"
    if isinstance(error, Malformed):
        return grpc.StatusCode.INVALID_ARGUMENT, FaultCode.MALFORMED.value, text
    code = error.code if isinstance(error, Refused) else FaultCode.INTERNAL.value
    return grpc.StatusCode.FAILED_PRECONDITION, str(code), text


class CallOutcome:
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


def last_detail(error: BaseException) -> str:
    """The end of gRPC's chain of reasons, which is the one that a user can act on."""
    return str(error.details()).rpartition(": ")[2] if isinstance(error, grpc.aio.AioRpcError) else "cancelled"


MESSAGES = Codec(
    encode,
    up={StreamKind.CONTROL: decode_control_up, StreamKind.LINK: decode_link_up},
    down={StreamKind.CONTROL: decode_control_down, StreamKind.LINK: decode_link_down},
)
# For benches that measure the line, or send what no program of ours would.
RAW = Codec(bytes, up=dict.fromkeys(StreamKind, bytes), down=dict.fromkeys(StreamKind, bytes))
