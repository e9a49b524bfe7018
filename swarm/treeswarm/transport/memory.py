"""The transport seam within one process: reliable by default, and as terrible as a seeded schedule says.

Messages pass through the codec, so what a test sends is what the wire would carry.  Everything is timed by the
running loop's clock, virtual in tests.
"""

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from treeswarm.errors import BadRequest, LinkBroken, Malformed, Refused, SwarmError, Unreachable
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import Describe, LinkHello, Message, Open
from treeswarm.transport.seam import Accept, StreamKind
from treeswarm.wire.codec import decode_control_down, decode_control_up, decode_link_down, decode_link_up, encode

# Messages a stream holds for a receiver that does not read; then send waits.
WINDOW = 16


@dataclass(frozen=True)
class Faults:
    """What the network does to each message of the kinds named: chances, and a delay's longest, in seconds."""

    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    """Chance of a delay on its own, so that later messages overtake."""
    max_delay_s: float = 0.0
    cut: float = 0.0
    """Chance that the stream breaks at this message."""
    kinds: frozenset[StreamKind] = frozenset(StreamKind)


@dataclass(frozen=True)
class _StreamClosed:
    error: SwarmError | None


@dataclass(eq=False)
class MemoryStream:
    """One end; `other` is the far one."""

    network: "MemoryNetwork"
    kind: StreamKind
    dialled: bool
    peer: str
    host: str = ""
    """Whose end this is: the address its transport listens on, if it does."""
    ended: bool = False
    other: "MemoryStream" = field(init=False)
    _inbox: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(WINDOW))
    _over: _StreamClosed | None = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, message: Message) -> None:
        if self._over is not None and self._over.error is not None:
            raise self._over.error
        if self.ended or self._over is not None or self.other._over is not None:
            raise LinkBroken(f"the stream to {self.peer} has ended")
        # A stream's first words are spared: a transport that lost them would not have connected.
        draw_delays = [0.0] if isinstance(message, LinkHello | Open | Describe) else self.network.draw_delays(self.kind)
        await self._carry(encode(message), draw_delays)

    async def send_bytes(self, data: bytes) -> None:
        """Raw, for tests that are hostile."""
        await self._carry(data, [0.0])

    async def _carry(self, data: bytes, draw_delays: Sequence[float | None]) -> None:
        if self.network.holds(self, data) or self.network.is_partitioned(self.host, self.other.host):
            return
        for delay in draw_delays:
            if delay is None:
                self.break_off()
                return
            if delay:
                asyncio.get_running_loop().call_later(delay, self.other.arrive_late, data)
            else:
                await self.other.arrive(data)

    async def arrive(self, data: bytes) -> None:
        waiting = asyncio.ensure_future(self._inbox.put(data))
        broken = asyncio.ensure_future(self._broken.wait())
        await asyncio.wait({waiting, broken}, return_when=asyncio.FIRST_COMPLETED)
        for task in (waiting, broken):
            task.cancel()
        self._ready.set()

    def arrive_late(self, data: bytes) -> None:
        if self._over is None and not self._inbox.full():
            self._inbox.put_nowait(data)
            self._ready.set()

    async def receive(self) -> Message | None:
        while self._inbox.empty():
            if self._over is not None:
                if self._over.error is not None:
                    raise self._over.error
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
                translated = None  # a dialler has no words for its going
            self.other.finish(translated)

    def finish(self, error: SwarmError | None) -> None:
        """The far end is over; what it sent before is still read."""
        if self._over is None:
            self._over = _StreamClosed(error)
        self._ready.set()

    def break_off(self) -> None:
        """Both ends are lost."""
        for end in (self, self.other):
            end._over = _StreamClosed(LinkBroken(f"the stream to {end.peer} broke"))
            end._broken.set()
            end._ready.set()

    def __post_init__(self) -> None:
        self._broken = asyncio.Event()

    def _decode(self, data: bytes) -> Message:
        if self.kind is StreamKind.LINK:
            return decode_link_down(data) if self.dialled else decode_link_up(data)
        return decode_control_down(data) if self.dialled else decode_control_up(data)


@dataclass(eq=False)
class MemoryNetwork:
    """All that is connected to it, by address."""

    seed: int = 0
    faults: Faults = Faults()
    streams: list[MemoryStream] = field(default_factory=list)
    listeners: dict[str, "MemoryListener"] = field(default_factory=dict)
    partitions: set[frozenset[str]] = field(default_factory=set)
    """Pairs of hosts between which messages vanish, though every stream looks open."""
    frozen: dict[str, list[tuple[MemoryStream, bytes]]] = field(default_factory=dict)
    """Hosts that hang, and what waits for them or would leave them."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._ports = itertools.count(50_000)

    def transport(self) -> "MemoryTransport":
        """A way in."""
        return MemoryTransport(self)

    def disconnect_host(self, host: str) -> None:
        """The host is gone: its streams break, nobody answers there."""
        self.listeners.pop(host, None)
        self.frozen.pop(host, None)
        for stream in [stream for stream in self.streams if stream.host == host]:
            stream.break_off()

    def is_partitioned(self, one: str, other: str) -> bool:
        """Whether messages between two hosts vanish."""
        return frozenset((one, other)) in self.partitions

    def freeze(self, host: str) -> None:
        """The host hangs: nothing moves, nothing breaks."""
        self.frozen.setdefault(host, [])

    async def thaw(self, host: str) -> None:
        """It goes on where it was: what waited arrives, in order."""
        for stream, data in self.frozen.pop(host, []):
            if stream._over is None and not self.holds(stream, data):
                stream.other.arrive_late(data)

    def holds(self, stream: MemoryStream, data: bytes) -> bool:
        """Whether a message has to wait for one of its ends."""
        waiting = next((self.frozen[host] for host in (stream.host, stream.other.host) if host in self.frozen), None)
        if waiting is not None:
            waiting.append((stream, data))
        return waiting is not None

    def free_port(self) -> int:
        return next(self._ports)

    def draw_delays(self, kind: StreamKind) -> list[float | None]:
        """Delays at which copies of one message arrive: usually [0.0]; [] dropped, [None] the stream breaks."""
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
    serving: set[asyncio.Task[None]] = field(default_factory=set)
    accepted: list[MemoryStream] = field(default_factory=list)

    async def close(self) -> None:
        self.network.listeners.pop(self.address, None)
        for stream in self.accepted:
            stream.break_off()
        for task in self.serving:
            task.cancel()
        await asyncio.gather(*self.serving, return_exceptions=True)

    def serve(self, kind: StreamKind, stream: MemoryStream) -> None:
        """Hand a stream to the acceptor in a task of its own."""
        task = asyncio.create_task(self._serve(kind, stream))
        self.serving.add(task)
        self.accepted.append(stream)
        task.add_done_callback(self.serving.discard)

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
    closed: bool = False

    async def connect(self, address: str, kind: StreamKind) -> MemoryStream:
        target = Address.parse(address).bare
        if self.closed:
            raise Unreachable(f"{target} is not dialled: this transport was closed")
        listener = self.network.listeners.get(target)
        if listener is None or self.network.is_partitioned(self.host, target) or target in self.network.frozen:
            raise Unreachable(f"nobody answers at {target}: check the address and that the node runs")
        near = MemoryStream(self.network, kind, True, target, self.host)
        far = MemoryStream(self.network, kind, False, self.host or "memory", target)
        near.other, far.other = far, near
        self.network.streams += [near, far]
        self.dialled.append(near)
        listener.serve(kind, far)
        return near

    async def listen(self, address: str, accept: Accept) -> MemoryListener:
        wanted = Address.parse(address)
        bound = str(Address(wanted.host, wanted.port or self.network.free_port()))
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
