"""A star, as Petals ships it: every hop goes through the client, so a traversal pays two links a node.

Nodes are told that their next hop is a relay in the client's process; it leads each link on to the node that the ticket
is for.  Real processes, real streams, the product's own code on every node: only the way between them is longer.
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
    """`inner`, with every link between nodes led through `address`, which `relay` serves."""

    inner: Transport
    address: str = ""
    _beyond: dict[bytes, str] = field(default_factory=dict)
    """The node that a ticket is for; one entry a link, for as long as this lives."""

    async def connect(self, address: str, kind: StreamKind) -> Stream:
        stream = await self.inner.connect(address, kind)
        return _Redirecting(stream, self) if kind is StreamKind.CONTROL else stream

    async def listen(self, address: str, accept: Accept) -> Listener:
        return await self.inner.listen(address, accept)

    async def close(self) -> None:
        await self.inner.close()

    def here(self, hop: NextHop | None) -> NextHop | None:
        """This relay instead of that node."""
        if hop is None:
            return None
        self._beyond[hop.ticket] = hop.address
        return replace(hop, address=self.address)

    async def relay(self, kind: StreamKind, stream: Stream) -> None:
        """One link, until either side ends it.  Raises Refused for one that no ticket is known of."""
        hello = await stream.receive() if kind is StreamKind.LINK else None
        if not isinstance(hello, LinkHello) or hello.ticket not in self._beyond:
            raise Refused("this relay leads links of its own sessions, and nothing else", FaultCode.MALFORMED)
        onward = await self.inner.connect(self._beyond[hello.ticket], StreamKind.LINK)
        await onward.send(hello)
        ways = [asyncio.create_task(_lead(stream, onward)), asyncio.create_task(_answered(onward, stream))]
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
class _Redirecting:
    """A control stream on which nodes hear of the relay where the client says their next hop."""

    inner: Stream
    star: StarTransport

    @property
    def peer(self) -> str:
        return self.inner.peer

    async def send(self, message: Message) -> None:
        if isinstance(message, Open | Resume):
            message = replace(message, next_hop=self.star.here(message.next_hop))
        await self.inner.send(message)

    async def receive(self) -> Message | None:
        return await self.inner.receive()

    async def end(self, error: Exception | None = None) -> None:
        await self.inner.end(error)


@contextlib.asynccontextmanager
async def star_transport(link: str, swarm_key: bytes | None) -> AsyncIterator[StarTransport]:
    """For a client: its own line of the shape `link` carries what it says and what it passes on."""
    identity = Identity.ephemeral()
    inner = EmulatedTransport(GrpcTransport(security=Security(identity, swarm_key)), LinkShape.parse(link))
    async with star_over(inner, identity.pin) as star:
        yield star


@contextlib.asynccontextmanager
async def star_over(inner: Transport, pin: str = "") -> AsyncIterator[StarTransport]:
    """One whose relay listens on `inner`, and answers with `pin` where that is secured; `inner` is closed with it."""
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


async def _lead(stream: Stream, onward: Stream) -> None:
    while (message := await stream.receive()) is not None:
        await onward.send(message)


async def _answered(onward: Stream, stream: Stream) -> None:
    """A link carries no more back than that rows may be packed, and its end.  Raises what that was."""
    with contextlib.suppress(SwarmError):
        while (message := await onward.receive()) is not None:
            await stream.send(message)
    raise LinkBroken("the node beyond the relay closed its link")
