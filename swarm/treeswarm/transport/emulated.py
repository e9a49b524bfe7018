"""Emulated links around any transport: what a program sends arrives after a given delay and at a given rate."""

import asyncio
import re
from dataclasses import dataclass, field

from treeswarm.errors import BadRequest, LinkBroken, SwarmError
from treeswarm.protocol.messages import Message
from treeswarm.transport.seam import Accept, Listener, Stream, StreamKind, Transport
from treeswarm.wire.codec import encode

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
DELAY = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)")
NOTHING = re.compile(r"(?!)")
# Number of messages in transit; a real link of 200 ms holds far fewer messages of these sizes.
MAX_IN_TRANSIT = 256
# Seconds that the inner transport may take to deliver what has crossed the emulated link.
FLUSH_S = 5.0


def parse_rate(text: str) -> float:
    """Return the bits per second of a rate such as `20mbit`.  Raises BadRequest."""
    match = RATE.fullmatch(text.strip())
    if match is None:
        raise BadRequest(f"'{text}' is no rate: give a number with a unit, such as 20mbit or 800kbit")
    return float(match[1]) * UNITS[match[2]]


@dataclass(frozen=True)
class LinkShape:
    """Delay and rate of a link."""

    delay_s: float = 0.0
    """One-way delay in seconds."""
    rate: float | None = None
    """Rate in bits per second, or None for no limit."""

    @classmethod
    def parse(cls, text: str) -> "LinkShape":
        """Read `delay=25ms,rate=100mbit`; either part may be left out.  Raises BadRequest."""
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, amount = part.strip().partition("=")
            match = {"delay": DELAY, "rate": RATE}.get(name, NOTHING).fullmatch(amount)
            if match is None:
                raise BadRequest(f"'{text}' is not a link: give delay=25ms,rate=100mbit or one of the two")
            values[name] = float(match[1]) * UNITS[match[2]]
        if values.get("rate") == 0.0:
            raise BadRequest(f"'{text}' has a rate of 0: give a rate above 0")
        return cls(values.get("delay", 0.0), values.get("rate"))


@dataclass(eq=False)
class EmulatedUplink:
    """A program's outgoing connection, shared by all its streams: one message at a time leaves at the link's rate."""

    shape: LinkShape
    _free_at: float = 0.0

    def arrival(self, size: int, now: float) -> float:
        """Return the time at which `size` bytes sent at `now` reach the other end."""
        sent = max(now, self._free_at) + (size * 8 / self.shape.rate if self.shape.rate else 0.0)
        self._free_at = sent
        return sent + self.shape.delay_s

    def seconds_until_idle(self, now: float) -> float:
        """Return the seconds until everything sent so far has arrived."""
        return max(0.0, self._free_at - now) + self.shape.delay_s


@dataclass(eq=False)
class EmulatedStream:
    """Delays what this end sends.  Order is kept, because the arrival times of one uplink only increase."""

    inner: Stream
    uplink: EmulatedUplink
    _outbox: asyncio.Queue[tuple[float, Message | None]] = field(default_factory=lambda: asyncio.Queue(MAX_IN_TRANSIT))
    _broken: SwarmError | None = None
    _ending: bool = False

    def __post_init__(self) -> None:
        self._carrier = asyncio.create_task(self._carry())

    @property
    def peer(self) -> str:
        return self.inner.peer

    async def send(self, message: Message) -> None:
        if self._broken is not None:
            raise self._broken
        if self._ending:
            raise LinkBroken(f"the stream to {self.peer} has ended")
        now = asyncio.get_running_loop().time()
        await self._outbox.put((self.uplink.arrival(len(encode(message)), now), message))

    async def receive(self) -> Message | None:
        return await self.inner.receive()

    async def end(self, error: Exception | None = None) -> None:
        try:
            await self.flush()
        finally:
            await self.inner.end(error)

    async def flush(self) -> None:
        """Accept no more messages, and wait until the messages sent before have arrived."""
        if not self._ending:
            self._ending = True
            await self._outbox.put((0.0, None))
        if not self.over:
            timeout_s = self.uplink.seconds_until_idle(asyncio.get_running_loop().time()) + FLUSH_S
            await asyncio.wait({self._carrier}, timeout=timeout_s)

    def drop(self) -> None:
        """Discard the messages in transit."""
        self._ending = True
        self._carrier.cancel()

    @property
    def over(self) -> bool:
        """Whether no message is in transit or ever will be."""
        return self._carrier.done()

    async def _carry(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            arrival, message = await self._outbox.get()
            if message is None:
                return
            if self._broken is not None:
                continue  # Keep emptying the queue: a sender that waits for room gets the error at its next send.
            await asyncio.sleep(arrival - loop.time())
            try:
                await self.inner.send(message)
            except SwarmError as error:
                self._broken = error


@dataclass(eq=False)
class EmulatedTransport:
    """Wraps `inner`, so that dialled and accepted streams have links of `shape`."""

    inner: Transport
    shape: LinkShape
    _streams: set[EmulatedStream] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._uplink = EmulatedUplink(self.shape)

    async def connect(self, address: str, kind: StreamKind) -> Stream:
        return self._wrap(await self.inner.connect(address, kind))

    async def listen(self, address: str, accept: Accept) -> Listener:
        async def accept_wrapped(kind: StreamKind, stream: Stream) -> None:
            wrapped = self._wrap(stream)
            try:
                await accept(kind, wrapped)
            except SwarmError:
                await wrapped.flush()  # Messages that explain the error must arrive before it.
                raise
            else:
                await wrapped.flush()
            finally:
                wrapped.drop()

        return await self.inner.listen(address, accept_wrapped)

    async def close(self) -> None:
        for stream in self._streams:
            stream.drop()
        self._streams.clear()
        await self.inner.close()

    def _wrap(self, stream: Stream) -> EmulatedStream:
        self._streams = {stream for stream in self._streams if not stream.over}
        wrapped = EmulatedStream(stream, self._uplink)
        self._streams.add(wrapped)
        return wrapped
