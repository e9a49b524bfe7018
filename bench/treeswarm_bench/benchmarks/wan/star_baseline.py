"""A star, as Petals ships it: every hop goes through the client, so a traversal pays two links per node.

Each node's next hop is a relay in the client's process, which forwards each link to the node that the ticket is for.
Processes and streams are real, and every node runs the product's own code: only the way between them is longer.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from treeswarm.errors import LinkBroken, Refused, SwarmError
from treeswarm.keys import Identity
from treeswarm.protocol.messages import FaultCode, LinkHello, Message, NextHop, Open, Resume
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Accept, Listener, Stream, StreamKind, Transport
from treeswarm.transport.tls import Security


@dataclass(eq=False)
class StarTransport:
    """The transport `inner`, with every link between nodes led through `address`, which `relay` serves."""

    inner: Transport
    address: str = ""
    _beyond: dict[bytes, str] = field(default_factory=dict)
    """Address of the node that each ticket is for; entries, one per link, stay as long as the transport lives."""

    async def connect(self, address: str, kind: StreamKind) -> Stream:
        stream = await self.inner.connect(address, kind)
        return _RedirectingStream(stream, self) if kind is StreamKind.CONTROL else stream

    async def listen(self, address: str, accept: Accept) -> Listener:
        return await self.inner.listen(address, accept)

    async def close(self) -> None:
        await self.inner.close()

    def redirect(self, hop: NextHop | None) -> NextHop | None:
        """Remember the node of a hop, and return the hop with this relay's address."""
        if hop is None:
            return None
        self._beyond[hop.ticket] = hop.address
        return replace(hop, address=self.address)

    async def relay(self, kind: StreamKind, stream: Stream) -> None:
        """Forward one link until either side ends it.  Raises Refused for a link with an unknown ticket."""
        hello = await stream.receive() if kind is StreamKind.LINK else None
        if not isinstance(hello, LinkHello) or hello.ticket not in self._beyond:
            raise Refused("this relay forwards links of its own sessions only", FaultCode.MALFORMED)
        onward = await self.inner.connect(self._beyond[hello.ticket], StreamKind.LINK)
        await onward.send(hello)
        ways = [asyncio.create_task(_forward(stream, onward)), asyncio.create_task(_forward_back(onward, stream))]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in done:
                way.result()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            await onward.end()


@dataclass(eq=False)
class _RedirectingStream:
    """A control stream that names the relay to the node wherever the client names the node's next hop."""

    inner: Stream
    star: StarTransport

    @property
    def peer(self) -> str:
        return self.inner.peer

    async def send(self, message: Message) -> None:
        if isinstance(message, Open | Resume):
            message = replace(message, next_hop=self.star.redirect(message.next_hop))
        await self.inner.send(message)

    async def receive(self) -> Message | None:
        return await self.inner.receive()

    async def end(self, error: Exception | None = None) -> None:
        await self.inner.end(error)


@contextlib.asynccontextmanager
async def star_transport(link: str, swarm_key: bytes | None) -> AsyncIterator[StarTransport]:
    """Open a transport for a client: all that it sends and relays goes through one emulated link of shape `link`."""
    identity = Identity.ephemeral()
    inner = EmulatedTransport(GrpcTransport(security=Security(identity, swarm_key)), LinkShape.parse(link))
    async with star_over(inner, identity.pin) as star:
        yield star


@contextlib.asynccontextmanager
async def star_over(inner: Transport, pin: str = "") -> AsyncIterator[StarTransport]:
    """Open a star whose relay listens on `inner`, which is closed with it.

    `pin` is that of the key that answers there; it is empty where `inner` is not secured.
    """
    star = StarTransport(inner)
    try:
        listener = await star.listen("127.0.0.1:0", star.relay)
        star.address = f"{listener.address}#{pin}" if pin else listener.address
        try:
            yield star
        finally:
            await listener.close()
    finally:
        await star.close()


async def _forward(stream: Stream, onward: Stream) -> None:
    while (message := await stream.receive()) is not None:
        await onward.send(message)


async def _forward_back(onward: Stream, stream: Stream) -> None:
    """Forward what a link carries back: that rows may be compressed, and its end.  Raises LinkBroken at the end."""
    with contextlib.suppress(SwarmError):
        while (message := await onward.receive()) is not None:
            await stream.send(message)
    raise LinkBroken("the node beyond the relay closed its link")
