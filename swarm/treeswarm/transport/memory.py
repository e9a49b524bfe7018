"""The transport within one process: reliable by default, and as unreliable as a seeded schedule says.

Messages pass through the codec, so a test sends the bytes that gRPC would carry.  All delays are timed by the running
event loop's clock, which is virtual in tests.
"""

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from treeswarm.errors import BadRequest, LinkBroken, Malformed, Refused, SwarmError, Unreachable
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import Describe, LinkHello, Message, Open
from treeswarm.tasks import TaskSet
from treeswarm.transport.seam import Accept, StreamKind
from treeswarm.wire.codec import decode_control_down, decode_control_up, decode_link_down, decode_link_up, encode

# Number of messages that a stream holds for a receiver that does not read.  Beyond it, `send` waits.
WINDOW = 16


@dataclass(frozen=True)
class Faults:
    """Probabilities of what the network does to each message on streams of the given kinds."""

    drop: float = 0.0
    """Probability that the message is lost."""
    double: float = 0.0
    """Probability that the message arrives twice."""
    delay: float = 0.0
    """Probability that the message is delayed by itself, so that later messages overtake it."""
    max_delay_s: float = 0.0
    """Longest delay in seconds; delays are uniform between 0 and this."""
    cut: float = 0.0
    """Probability that the stream breaks at this message."""
    kinds: frozenset[StreamKind] = frozenset(StreamKind)


@dataclass(frozen=True)
class _StreamClosed:
    error: SwarmError | None


@dataclass(eq=False)
class MemoryStream:
    """One end of a stream; `other` is the opposite end."""

    network: "MemoryNetwork"
    kind: StreamKind
    dialled: bool
    """Whether this is the end that dialled."""
    peer: str
    host: str = ""
    """Address that this end's transport listens on, or an empty string if it does not listen."""
    ended: bool = False
    """Whether this end has called `end`."""
    other: "MemoryStream" = field(init=False)
    _inbox: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(WINDOW))
    _closed: _StreamClosed | None = None
    """Set when nothing more will arrive after the messages in the inbox."""
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, message: Message) -> None:
        if self._closed is not None and self._closed.error is not None:
            raise self._closed.error
        if self.ended or self._closed is not None or self.other._closed is not None:
            raise LinkBroken(f"the stream to {self.peer} has ended")
        # The first message of a stream is never lost: a transport that loses it would not have connected.
        opening = isinstance(message, LinkHello | Open | Describe)
        delays = [0.0] if opening else self.network.draw_delays(self.kind)
        await self._carry(encode(message), delays)

    async def send_bytes(self, data: bytes) -> None:
        """Send raw bytes, for tests of hostile peers."""
        await self._carry(data, [0.0])

    async def _carry(self, data: bytes, delays: Sequence[float | None]) -> None:
        if self.network.hold(self, data) or self.network.is_partitioned(self.host, self.other.host):
            return
        for delay in delays:
            if delay is None:
                self.break_off()
                return
            if delay:
                asyncio.get_running_loop().call_later(delay, self.other.arrive_late, data)
            else:
                await self.other.arrive(data)

    async def arrive(self, data: bytes) -> None:
        """Put a message into the inbox; wait for room while the stream is unbroken."""
        putting = asyncio.ensure_future(self._inbox.put(data))
        broken = asyncio.ensure_future(self._broken.wait())
        await asyncio.wait({putting, broken}, return_when=asyncio.FIRST_COMPLETED)
        for task in (putting, broken):
            task.cancel()
        self._ready.set()

    def arrive_late(self, data: bytes) -> None:
        """Put a delayed message into the inbox, or drop it if the stream is closed or the inbox is full."""
        if self._closed is None and not self._inbox.full():
            self._inbox.put_nowait(data)
            self._ready.set()

    async def receive(self) -> Message | None:
        while self._inbox.empty():
            if self._closed is not None:
                if self._closed.error is not None:
                    raise self._closed.error
                return None
            self._ready.clear()
            await self._ready.wait()
        data = self._inbox.get_nowait()
        try:
            return self._decode(data)
        except Malformed as error:
            await self.end(error)
            self.finish(error)
            raise

    async def end(self, error: Exception | None = None) -> None:
        if not self.ended:
            self.ended = True
            translated = error if error is None or isinstance(error, SwarmError) else Refused(str(error))
            if self.dialled or isinstance(translated, LinkBroken):
                translated = None  # As in gRPC, a dialler cannot send an error.
            self.other.finish(translated)

    def finish(self, error: SwarmError | None) -> None:
        """Note that the other end has ended the stream; the messages it sent before can still be received."""
        if self._closed is None:
            self._closed = _StreamClosed(error)
        self._ready.set()

    def break_off(self) -> None:
        """Break the stream at both ends."""
        for end in (self, self.other):
            end._closed = _StreamClosed(LinkBroken(f"the stream to {end.peer} broke"))
            end._broken.set()
            end._ready.set()

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will arrive at this end."""
        return self._closed is not None

    def __post_init__(self) -> None:
        self._broken = asyncio.Event()

    def _decode(self, data: bytes) -> Message:
        if self.kind is StreamKind.LINK:
            return decode_link_down(data) if self.dialled else decode_link_up(data)
        return decode_control_down(data) if self.dialled else decode_control_up(data)


@dataclass(eq=False)
class MemoryNetwork:
    """Listeners and streams of one simulated network.  A host is named by the address it listens on."""

    seed: int = 0
    faults: Faults = Faults()
    streams: list[MemoryStream] = field(default_factory=list)
    listeners: dict[str, "MemoryListener"] = field(default_factory=dict)
    partitions: set[frozenset[str]] = field(default_factory=set)
    """Pairs of hosts between which messages are lost although every stream looks open."""
    frozen: dict[str, list[tuple[MemoryStream, bytes]]] = field(default_factory=dict)
    """Messages held back to and from each frozen host, in order."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._ports = itertools.count(50_000)

    def transport(self) -> "MemoryTransport":
        """Return a new transport on this network."""
        return MemoryTransport(self)

    def disconnect_host(self, host: str) -> None:
        """Remove a host: its streams break, and dialling it raises Unreachable."""
        self.listeners.pop(host, None)
        self.frozen.pop(host, None)
        for stream in [stream for stream in self.streams if stream.host == host]:
            stream.break_off()

    def is_partitioned(self, first: str, second: str) -> bool:
        """Return whether messages between two hosts are lost."""
        return frozenset((first, second)) in self.partitions

    def freeze(self, host: str) -> None:
        """Hold all messages to and from a host back.  Its streams stay open."""
        self.frozen.setdefault(host, [])

    async def thaw(self, host: str) -> None:
        """End `freeze`: the messages held back arrive in order."""
        for stream, data in self.frozen.pop(host, []):
            if not stream.is_closed and not self.hold(stream, data):
                stream.other.arrive_late(data)

    def hold(self, stream: MemoryStream, data: bytes) -> bool:
        """Hold a message back if one of its ends is frozen, and return whether it was held back."""
        held = next((self.frozen[host] for host in (stream.host, stream.other.host) if host in self.frozen), None)
        if held is not None:
            held.append((stream, data))
        return held is not None

    def free_port(self) -> int:
        """Return a port that was not returned before."""
        return next(self._ports)

    def draw_delays(self, kind: StreamKind) -> list[float | None]:
        """Draw the fate of one message: the delay in seconds of each copy that arrives.

        The result is usually [0.0].  It is [] if the message is lost, and [None] if the stream breaks.
        """
        faults = self.faults
        if kind not in faults.kinds:
            return [0.0]
        if self._random.random() < faults.cut:
            return [None]
        if self._random.random() < faults.drop:
            return []
        copies = 2 if self._random.random() < faults.double else 1
        return [
            self._random.uniform(0, faults.max_delay_s) if self._random.random() < faults.delay else 0.0
            for _ in range(copies)
        ]


@dataclass(eq=False)
class MemoryListener:
    """An open address."""

    network: MemoryNetwork
    address: str
    accept: Accept
    accepted: list[MemoryStream] = field(default_factory=list)
    _serving: TaskSet = field(default_factory=TaskSet)

    async def close(self) -> None:
        self.network.listeners.pop(self.address, None)
        for stream in self.accepted:
            stream.break_off()
        await self._serving.close()

    def serve(self, kind: StreamKind, stream: MemoryStream) -> None:
        """Call `accept` for a stream in a task of its own."""
        self.accepted.append(stream)
        self._serving.start(self._serve(kind, stream))

    async def _serve(self, kind: StreamKind, stream: MemoryStream) -> None:
        try:
            await self.accept(kind, stream)
        except SwarmError as error:
            await stream.end(error)
        except Exception as error:
            report = {"message": "a stream's handler failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(report)
            await stream.end(Refused("internal error"))
        else:
            await stream.end()


@dataclass(eq=False)
class MemoryTransport:
    """Dials and listens on a network."""

    network: MemoryNetwork
    dialled: list[MemoryStream] = field(default_factory=list)
    host: str = ""
    """Address of the first listener, or an empty string if this transport does not listen."""
    closed: bool = False

    async def connect(self, address: str, kind: StreamKind) -> MemoryStream:
        target = Address.parse(address).bare
        if self.closed:
            raise Unreachable(f"cannot dial {target}: this transport was closed")
        listener = self.network.listeners.get(target)
        if listener is None or self.network.is_partitioned(self.host, target) or target in self.network.frozen:
            raise Unreachable(f"no answer from {target}: check the address and that the node runs")
        near = MemoryStream(self.network, kind, True, target, self.host)
        far = MemoryStream(self.network, kind, False, self.host or "memory", target)
        near.other, far.other = far, near
        self.network.streams += [near, far]
        self.dialled.append(near)
        listener.serve(kind, far)
        return near

    async def listen(self, address: str, accept: Accept) -> MemoryListener:
        parsed = Address.parse(address)
        bound = str(Address(parsed.host, parsed.port or self.network.free_port()))
        if bound in self.network.listeners:
            raise BadRequest(f"cannot listen on {bound}: the port is in use; choose another with --listen HOST:PORT")
        self.host = self.host or bound
        listener = MemoryListener(self.network, bound, accept)
        self.network.listeners[bound] = listener
        return listener

    async def close(self) -> None:
        self.closed = True
        for stream in self.dialled:
            if not stream.ended:
                stream.break_off()
        self.dialled.clear()
