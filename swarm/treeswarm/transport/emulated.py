"""Links of a given delay and rate, around any transport: what a program sends arrives later."""

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
# Messages on their way; a real link of 200 ms holds far fewer of these sizes.
ON_THE_WAY = 256
# How long the inner transport may take with what has crossed the emulated link.
FLUSH_S = 5.0


def parse_rate(text: str) -> float:
    """Bits a second of `20mbit`.  Raises BadRequest."""
    match = RATE.fullmatch(text.strip())
    if match is None:
        raise BadRequest(f"'{text}' is no rate: give something like 20mbit or 800kbit")
    return float(match[1]) * UNITS[match[2]]


@dataclass(frozen=True)
class LinkShape:
    """`delay_s` one way; `rate` in bits a second, None for no limit."""

    delay_s: float = 0.0
    rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> "LinkShape":
        """Read `delay=25ms,rate=100mbit`; either may be left out.  Raises BadRequest."""
        found: dict[str, float] = {}
        for part in text.split(","):
            what, _, amount = part.strip().partition("=")
            match = {"delay": DELAY, "rate": RATE}.get(what, NOTHING).fullmatch(amount)
            if match is None:
                raise BadRequest(f"'{text}' is no link: give delay=25ms,rate=100mbit or one of the two")
            found[what] = float(match[1]) * UNITS[match[2]]
        if found.get("rate") == 0.0:
            raise BadRequest(f"'{text}' is a link that carries nothing: give a rate above 0")
        return cls(found.get("delay", 0.0), found.get("rate"))


@dataclass(eq=False)
class EmulatedUplink:
    """A program's line out, shared by all its streams: one message at a time leaves at the line's rate."""

    shape: LinkShape
    _free_at: float = 0.0

    def arrival(self, size: int, now: float) -> float:
        """When `size` bytes handed over at `now` reach the other end."""
        sent = max(now, self._free_at) + (size * 8 / self.shape.rate if self.shape.rate else 0.0)
        self._free_at = sent
        return sent + self.shape.delay_s

    def seconds_until_idle(self, now: float) -> float:
        """Seconds until all that was handed over has arrived."""
        return max(0.0, self._free_at - now) + self.shape.delay_s


@dataclass(eq=False)
class EmulatedStream:
    """Delays what this end sends; order is kept, because one uplink's arrivals only grow."""

    inner: Stream
    uplink: EmulatedUplink
    _outbox: asyncio.Queue[tuple[float, Message | None]] = field(default_factory=lambda: asyncio.Queue(ON_THE_WAY))
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
        """Take nothing more, and wait until what was sent has arrived."""
        if not self._ending:
            self._ending = True
            await self._outbox.put((0.0, None))
        if not self.over:
            patience = self.uplink.seconds_until_idle(asyncio.get_running_loop().time()) + FLUSH_S
            await asyncio.wait({self._carrier}, timeout=patience)

    def drop(self) -> None:
        """Forget what is on the way."""
        self._ending = True
        self._carrier.cancel()

    @property
    def over(self) -> bool:
        """Nothing is on the way, or ever will be."""
        return self._carrier.done()

    async def _carry(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            arrival, message = await self._outbox.get()
            if message is None:
                return
            if self._broken is not None:
                continue  # whoever waits for room must get it, to be told at the next send
            await asyncio.sleep(arrival - loop.time())
            try:
                await self.inner.send(message)
            except SwarmError as error:
                self._broken = error


@dataclass(eq=False)
class EmulatedTransport:
    """`inner`, seen through links of `shape`: dialled and accepted streams alike."""

    inner: Transport
    shape: LinkShape
    _streams: set[EmulatedStream] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._uplink = EmulatedUplink(self.shape)

    async def connect(self, address: str, kind: StreamKind) -> Stream:
        return self._around(await self.inner.connect(address, kind))

    async def listen(self, address: str, accept: Accept) -> Listener:
        async def accept_slowly(kind: StreamKind, stream: Stream) -> None:
            around = self._around(stream)
            try:
                await accept(kind, around)
            except SwarmError:
                await around.flush()  # the words that explain the error come before it
                raise
            else:
                await around.flush()
            finally:
                around.drop()

        return await self.inner.listen(address, accept_slowly)

    async def close(self) -> None:
        for stream in self._streams:
            stream.drop()
        self._streams.clear()
        await self.inner.close()

    def _around(self, stream: Stream) -> EmulatedStream:
        self._streams = {known for known in self._streams if not known.over}
        around = EmulatedStream(stream, self._uplink)
        self._streams.add(around)
        return around
