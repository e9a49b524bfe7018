"""A client's control stream to one node: requests and grants, messages, pings."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from treeswarm.errors import LinkBroken, NodeLost, Refused, SwarmError, TransportError
from treeswarm.protocol.messages import Close, ControlDown, Fault, Hint, Open, Opened, Ping, Pong, Resume
from treeswarm.tasks import TaskSet
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_client.discovery.round_trip import PING_EVERY_S, Heartbeat
from treeswarm_client.discovery.route import Hop

# A node may be loading, or its machine swapping, when a session is opened; longer than this is as good as dead.
GRANT_S = 20.0
# The last frames of a stream that is closed are on their way, or never come.
CLOSE_S = 1.0


@dataclass(frozen=True)
class ControlHandlers:
    """The functions that a control stream calls."""

    on_message: Callable[["NodeControl", ControlDown], None]
    """Called with every message except pongs and grants that were waited for."""
    on_break: Callable[["NodeControl", SwarmError], None]
    """Called with the reason when the stream is of no more use."""
    on_silence: Callable[["NodeControl", float], bool]
    """Called with the seconds of a silence that is too long; returns whether to give the node up for it."""
    on_round_trip: Callable[[str, float], None]
    """Called with the node's id and the round-trip time in seconds of every pong."""


@dataclass(frozen=True)
class NodeProgress:
    """How far the session's appends have come at a node, as its last pong reported."""

    received: int = 0
    """Number of appends the node has received in order."""
    passed_on: int = 0
    """Number of these that the node has sent on or answered."""
    replayed: int = 0
    """Number of replayed frames the node has handled."""
    changed_at: float = 0.0
    """Time of the loop's clock, in seconds, at which any of these last changed."""
    known_at: float = 0.0
    """Time at which the ping was sent that the last pong answered: the node's silence since then tells nothing."""

    def updated(self, received: int, passed_on: int, replayed: int, pinged_at: float, now: float) -> "NodeProgress":
        """Return the progress after a pong with these numbers, which answers a ping from `pinged_at`."""
        unchanged = (received, passed_on, replayed) == (self.received, self.passed_on, self.replayed)
        return NodeProgress(received, passed_on, replayed, self.changed_at if unchanged else now, pinged_at)


@dataclass(eq=False)
class NodeControl:
    """The control stream to one node of a session."""

    hop: Hop
    session: bytes
    """Id of the session."""
    handlers: ControlHandlers
    stream: Stream | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    epoch: int = -1
    """Number of the last epoch that the node agreed to."""
    progress: NodeProgress = NodeProgress()
    broken: SwarmError | None = None
    """Why the stream is of no more use, or None while it is."""
    _granted: asyncio.Future[Opened] | None = None
    _tasks: TaskSet = field(default_factory=TaskSet)

    async def connect(self, transport: Transport) -> None:
        """Connect to the node.  May be called again after the stream broke.  Raises Unreachable."""
        await self.end()
        start = asyncio.get_running_loop().time()
        self.stream = await transport.connect(self.hop.address, StreamKind.CONTROL)
        now = asyncio.get_running_loop().time()
        self.broken = None
        self.heartbeat.begin(now)
        if not self.heartbeat.round_trip.samples:
            # A handshake takes several round trips: a first guess on the safe side.
            self.heartbeat.add_round_trip(now - start, now)
        self._tasks.start(self._listen(self.stream))
        self._tasks.start(self._ping(self.stream))

    async def request(self, request: Open | Resume) -> Opened:
        """Send a request and return the node's grant.

        Raises Refused with the node's reason, NodeLost if it does not answer within 20 s, or why the stream broke.
        """
        if self.stream is None or self.broken is not None:
            raise self.broken or LinkBroken(f"{self.hop.address} is not connected")
        self._granted = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(GRANT_S):
                await self.stream.send(request)
                while True:
                    granted = await asyncio.shield(self._granted)
                    if granted.epoch == request.epoch:
                        return granted
                    self._granted = asyncio.get_running_loop().create_future()
        except TimeoutError:
            raise NodeLost(f"{self.hop} did not answer within {GRANT_S:.0f} s", self.hop.address) from None
        finally:
            if self._granted.done() and not self._granted.cancelled():
                self._granted.exception()  # if sending failed too, it has raised the same: mark this as retrieved
            self._granted = None

    async def send_hint(self, hint: Hint) -> None:
        """Send a hint if the stream allows it.  A node that misses it only computes rows in vain."""
        if self.stream is not None and self.broken is None:
            with contextlib.suppress(SwarmError, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self.stream.send(hint)

    async def close_session(self) -> None:
        """Free the session on the node if it still listens, and end the stream."""
        if self.stream is not None and self.broken is None:
            with contextlib.suppress(SwarmError, TimeoutError):
                await asyncio.wait_for(self.stream.send(Close(self.session)), CLOSE_S)
        await self.end()

    async def end(self) -> None:
        """End the stream, and nothing of the session on the node."""
        await self._tasks.close()
        if self.stream is not None:
            with contextlib.suppress(SwarmError, TimeoutError):
                await asyncio.wait_for(self.stream.end(), CLOSE_S)
            self.stream = None

    async def _listen(self, stream: Stream) -> None:
        try:
            while (message := await stream.receive()) is not None:
                self.heartbeat.hear(asyncio.get_running_loop().time())
                self._on_message(message)
            self._break(LinkBroken(f"{self.hop} ended the session"))
        except TransportError as error:
            self._break(error)
        except SwarmError as error:
            self.handlers.on_break(self, error)
            self._break(error)

    def _on_message(self, message: object) -> None:
        waiting = self._granted is not None and not self._granted.done()
        match message:
            case Pong(stamp, received, passed_on, replayed):
                now = self.heartbeat.heard_at
                round_trip_s = max(0.0, now - stamp / 1e6)
                self.heartbeat.add_round_trip(round_trip_s, now)
                self.progress = self.progress.updated(received, passed_on, replayed, stamp / 1e6, now)
                self.handlers.on_round_trip(self.hop.node, round_trip_s)
            case Opened() if waiting:
                assert self._granted is not None
                self.epoch = message.epoch
                self._granted.set_result(message)
            case Fault(fatal=True) if waiting:
                assert self._granted is not None
                self._granted.set_exception(Refused(f"{self.hop} refused: {message.message}", message.code))
            case _:
                self.handlers.on_message(self, message)  # type: ignore[arg-type]

    async def _ping(self, stream: Stream) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(SwarmError):
            while True:
                await stream.send(Ping(int(loop.time() * 1e6), self.session))
                asleep_at = loop.time()
                await asyncio.sleep(PING_EVERY_S)
                self.heartbeat.excuse(loop.time() - asleep_at - PING_EVERY_S)
                silence_s = self.heartbeat.silence_s(loop.time())
                if self.heartbeat.is_overdue(loop.time()) and self.handlers.on_silence(self, silence_s):
                    error = NodeLost(f"lost {self.hop}: nothing heard for {silence_s:.1f} s", self.hop.address)
                    self.handlers.on_break(self, error)
                    self._break(error)
                    return

    def _break(self, error: SwarmError) -> None:
        if self.broken is None:
            self.broken = error
            if self._granted is not None and not self._granted.done():
                self._granted.set_exception(error)
            self.handlers.on_break(self, error)
