"""The client's own link, to the head of a chain.  It carries appends; faults come on the head's control stream."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from treeswarm.errors import NodeLost, SwarmError
from treeswarm.protocol.messages import Append, LinkHello
from treeswarm.tasks import TaskSet
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_client.chain.control_stream import CLOSE_S
from treeswarm_client.chain.stall_detection import LEAST_IN_NODE_S
from treeswarm_client.discovery.route import Hop


@dataclass(eq=False)
class HeadLink:
    """One link at a time from the client to the head."""

    transport: Transport
    on_break: Callable[[SwarmError | None], None]
    """Called once for each link that ends before it is closed, with the reason if there is one."""
    background: TaskSet
    _hop: Hop | None = None
    _stream: Stream | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a link."""
        return self._stream is not None

    async def connect(self, hop: Hop, hello: LinkHello) -> None:
        """Replace the link by a new one to `hop`.  Raises SwarmError if the transport fails."""
        self.close()
        stream = await self.transport.connect(hop.address, StreamKind.LINK)
        self._hop, self._stream = hop, stream
        self.background.start(self._watch(stream))
        await stream.send(hello)

    async def send(self, append: Append, *, unless: asyncio.Event) -> bool:
        """Send an append; return False if the link broke, or `unless` was set before the head took the append."""
        stream = self._stream
        if stream is None:
            return False
        try:
            if await self._send(stream, append, unless):
                return True
            if self._stream is stream:
                self.close()  # the link may carry half of an append
        except SwarmError as error:
            self._break(stream, error)
        return False

    def close(self) -> None:
        """End the link in the background.  From here on its end is not reported."""
        if self._stream is not None:
            self.background.start(_end_quietly(self._stream))
            self._stream = None

    async def _send(self, stream: Stream, append: Append, unless: asyncio.Event) -> bool:
        """Raise the stream's error, or NodeLost if the head takes nothing for longer than any forward lasts."""
        sending = asyncio.ensure_future(stream.send(append))
        stopped = asyncio.ensure_future(unless.wait())
        try:
            await asyncio.wait({sending, stopped}, timeout=LEAST_IN_NODE_S, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            elif not stopped.done():
                assert self._hop is not None
                raise NodeLost(f"{self._hop} takes nothing for {LEAST_IN_NODE_S:.0f} s", self._hop.address)
            return sending.done()
        finally:
            for task in (sending, stopped):
                task.cancel()
            await asyncio.gather(sending, stopped, return_exceptions=True)

    async def _watch(self, stream: Stream) -> None:
        """Wait for the link's end.  The head ends its link only if something is wrong."""
        reason = None
        try:
            await stream.receive()
        except SwarmError as error:
            reason = error
        self._break(stream, reason)

    def _break(self, stream: Stream, reason: SwarmError | None) -> None:
        if self._stream is stream:
            self.close()
            self.on_break(reason)


async def _end_quietly(stream: Stream) -> None:
    with contextlib.suppress(SwarmError, TimeoutError):
        await asyncio.wait_for(stream.end(), CLOSE_S)
