"""The client's own link, to the head of a chain: appends go in; what is wrong, the head's control stream tells."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from treeswarm.errors import NodeLost, SwarmError
from treeswarm.protocol.messages import Append, LinkHello
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_client.chain.control_stream import GOODBYE_S
from treeswarm_client.chain.stall_detection import LEAST_IN_A_NODE_S
from treeswarm_client.discovery.route import Hop


@dataclass(eq=False)
class HeadLink:
    """One link at a time.  `broke` is told once of each that ends before it is let go, and why, if anybody said."""

    broke: Callable[[SwarmError | None], None]
    background: Callable[[Coroutine[None, None, None]], None]
    """Does work that nobody waits for."""
    _hop: Hop | None = None
    _stream: Stream | None = None

    @property
    def connected(self) -> bool:
        return self._stream is not None

    async def dial(self, transport: Transport, hop: Hop, hello: LinkHello) -> None:
        """A new link, instead of the old one.  Raises what the transport says."""
        self.close()
        stream = await transport.connect(hop.address, StreamKind.LINK)
        self._hop, self._stream = hop, stream
        self.background(self._watch(stream))
        await stream.send(hello)

    async def send(self, append: Append, *, unless: asyncio.Event) -> bool:
        """Hand it over; False where the link broke or `unless` was set before the head took it."""
        stream = self._stream
        if stream is None:
            return False
        try:
            if await self._sent(stream, append, unless):
                return True
            if self._stream is stream:
                self.close()  # with half an append on it
        except SwarmError as error:
            self._break(stream, error)
        return False

    def close(self) -> None:
        """How it ends is nobody's fault any more."""
        if self._stream is not None:
            self.background(_end_quietly(self._stream))
            self._stream = None

    async def _sent(self, stream: Stream, append: Append, unless: asyncio.Event) -> bool:
        """Raises what the link says, and NodeLost when the head takes nothing for longer than any forward."""
        sending = asyncio.ensure_future(stream.send(append))
        stopped = asyncio.ensure_future(unless.wait())
        try:
            await asyncio.wait({sending, stopped}, timeout=LEAST_IN_A_NODE_S, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            elif not stopped.done():
                assert self._hop is not None
                raise NodeLost(f"{self._hop} takes nothing for {LEAST_IN_A_NODE_S:.0f} s", self._hop.address)
            return sending.done()
        finally:
            for task in (sending, stopped):
                task.cancel()
            await asyncio.gather(sending, stopped, return_exceptions=True)

    async def _watch(self, stream: Stream) -> None:
        """The head ends its link only when something is wrong."""
        why = None
        try:
            await stream.receive()
        except SwarmError as error:
            why = error
        self._break(stream, why)

    def _break(self, stream: Stream, why: SwarmError | None) -> None:
        if self._stream is stream:
            self.close()
            self.broke(why)


async def _end_quietly(stream: Stream) -> None:
    with contextlib.suppress(SwarmError, TimeoutError):
        await asyncio.wait_for(stream.end(), GOODBYE_S)
