"""A client's control stream to one node: questions, answers, and signs of life."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from treeswarm.errors import LinkBroken, NodeLost, Refused, SwarmError, TransportError
from treeswarm.protocol.messages import Close, ControlDown, Fault, Hint, Open, Opened, Ping, Pong, Resume
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_client.discovery.round_trip import RoundTrip
from treeswarm_client.discovery.route import Hop

PING_EVERY_S = 0.5
# A living node's event loop was seen to stall for a second and more on a machine with ten busy processes on two cores;
# to take a slow node for a dead one costs a replay, so the measured deadline is never trusted below this.
LEAST_SILENCE_S = 2.0
# A node may be loading, or its machine swapping, when a session is opened; longer than this is as good as dead.
GRANT_S = 20.0
# The words a stream ends with are on their way, or never come.
GOODBYE_S = 1.0


@dataclass(eq=False)
class NodeControl:
    """One node of a session.  `hear` gets every message but the pongs, `drop_node` why it seems lost."""

    hop: Hop
    session: bytes
    hear: Callable[["NodeControl", ControlDown], None]
    drop_node: Callable[["NodeControl", SwarmError], None]
    answered: Callable[[str, float], None]
    stream: Stream | None = None
    round_trip: RoundTrip = RoundTrip()
    epoch: int = -1
    """The last one the node was told of and agreed to."""
    received: int = 0
    """Appends the node has received in order, as its last pong said."""
    passed_on: int = 0
    """Of these, those that it has sent on or answered."""
    replayed: int = 0
    moved_at: float = 0.0
    """When any of these last changed."""
    broken: SwarmError | None = None
    """Why the stream is no longer of use."""
    _heard_at: float = 0.0
    _granted: asyncio.Future[Opened] | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def connect(self, transport: Transport) -> None:
        """Dial.  Raises Unreachable; may be called again after the stream broke."""
        await self._stop()
        start = asyncio.get_running_loop().time()
        self.stream = await transport.connect(self.hop.address, StreamKind.CONTROL)
        self.broken, self._heard_at = None, asyncio.get_running_loop().time()
        if not self.round_trip.samples:
            # A handshake is some round trips: a first guess on the safe side.
            self.round_trip = self.round_trip.with_sample(self._heard_at - start)
        self._tasks = [asyncio.create_task(self._listen(self.stream)), asyncio.create_task(self._ping(self.stream))]

    async def ask(self, wanted: Open | Resume) -> Opened:
        """Send, and wait for the grant.  Raises Refused with the node's words, NodeLost when it says nothing."""
        if self.stream is None or self.broken is not None:
            raise self.broken or LinkBroken(f"{self.hop.address} is not connected")
        self._granted = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(GRANT_S):
                await self.stream.send(wanted)
                while True:
                    granted = await asyncio.shield(self._granted)
                    if granted.epoch == wanted.epoch:
                        return granted
                    self._granted = asyncio.get_running_loop().create_future()
        except TimeoutError:
            raise NodeLost(f"{self.hop} did not answer within {GRANT_S:.0f} s", self.hop.address) from None
        finally:
            if self._granted.done() and not self._granted.cancelled():
                self._granted.exception()  # sending failed too, and said the same: nobody needs to hear it again
            self._granted = None

    async def tell(self, send_hint: Hint) -> None:
        """Whoever does not hear it only works in vain."""
        if self.stream is not None and self.broken is None:
            with contextlib.suppress(SwarmError, TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self.stream.send(send_hint)

    async def close_session(self) -> None:
        """Free the session there, if anybody listens."""
        if self.stream is not None and self.broken is None:
            with contextlib.suppress(SwarmError, TimeoutError):
                await asyncio.wait_for(self.stream.send(Close(self.session)), GOODBYE_S)
        await self._stop()

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.stream is not None:
            with contextlib.suppress(SwarmError, TimeoutError):
                await asyncio.wait_for(self.stream.end(), GOODBYE_S)
            self.stream = None

    async def _listen(self, stream: Stream) -> None:
        try:
            while (message := await stream.receive()) is not None:
                self._heard_at = asyncio.get_running_loop().time()
                self._take(message)
            self._break(LinkBroken(f"{self.hop} ended the session"))
        except TransportError as error:
            self._break(error)
        except SwarmError as error:
            self.drop_node(self, error)
            self._break(error)

    def _take(self, message: object) -> None:
        match message:
            case Pong(stamp, received, passed_on, replayed):
                round_trip_s = max(0.0, self._heard_at - stamp / 1e6)
                self.round_trip = self.round_trip.with_sample(round_trip_s)
                if (received, passed_on, replayed) != (self.received, self.passed_on, self.replayed):
                    self.received, self.passed_on, self.replayed = received, passed_on, replayed
                    self.moved_at = self._heard_at
                self.answered(self.hop.node, round_trip_s)
            case Opened() if self._granted is not None and not self._granted.done():
                self.epoch = message.epoch
                self._granted.set_result(message)
            case Fault(fatal=True) if self._granted is not None and not self._granted.done():
                said = Refused(f"{self.hop} refused: {message.message}", message.code)
                self._granted.set_exception(said)
            case _:
                self.hear(self, message)  # type: ignore[arg-type]

    async def _ping(self, stream: Stream) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(SwarmError):
            while True:
                await stream.send(Ping(int(loop.time() * 1e6), self.session))
                await asyncio.sleep(PING_EVERY_S)
                silence = loop.time() - self._heard_at
                if silence > PING_EVERY_S + self.round_trip.deadline(LEAST_SILENCE_S):
                    error = NodeLost(f"lost {self.hop}: nothing heard for {silence:.1f} s", self.hop.address)
                    self.drop_node(self, error)
                    self._break(error)
                    return

    def _break(self, error: SwarmError) -> None:
        if self.broken is None:
            self.broken = error
            if self._granted is not None and not self._granted.done():
                self._granted.set_exception(error)
            self.drop_node(self, error)
