"""Nodes without a model that listen on loopback, and clients without an identity that dial them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from treeswarm.keys import Identity
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import Message, Ping, Pong
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm.transport.tls import Security
from treeswarm_node.config import LendingConfig
from treeswarm_node.reachability.port_lender import PortLender
from treeswarm_node.sessions.server import NodeServer

CONTROL, LINK = StreamKind.CONTROL, StreamKind.LINK
# All connections of a test come from one host, so one host may lease every port.
GENEROUS = LendingConfig(ports=8, ports_to_host=8)
SOON_S = 20.0


@dataclass(eq=False)
class Peer:
    """A node without a model, listening on loopback."""

    node: NodeServer
    transport: GrpcTransport
    pin: str
    local: str = ""
    """`host:port` on which the node listens."""
    received: asyncio.Queue[Message | None] = field(default_factory=asyncio.Queue)
    """Messages that came on links; None where a link ended."""

    @property
    def address(self) -> str:
        return f"{self.local}#{self.pin}"

    @property
    def port_lender(self) -> PortLender:
        assert self.node.port_lender is not None
        return self.node.port_lender


@contextlib.asynccontextmanager
async def peer(limits: LendingConfig = GENEROUS, **lender_options: object) -> AsyncIterator[Peer]:
    identity = Identity.ephemeral()
    transport = GrpcTransport(security=Security(identity))
    node = NodeServer(transport, port_lender=PortLender("127.0.0.1", limits, **lender_options))  # type: ignore[arg-type]
    new_peer = Peer(node, transport, identity.pin)

    async def accept(kind: StreamKind, stream: Stream) -> None:
        if kind is CONTROL:
            await node.accept(kind, stream)
            return
        while (message := await stream.receive()) is not None:
            await new_peer.received.put(message)
        await new_peer.received.put(None)

    listener = await transport.listen("127.0.0.1:0", accept)
    new_peer.local = listener.address
    try:
        yield new_peer
    finally:
        await listener.close()
        await transport.close()


@contextlib.asynccontextmanager
async def client_transport() -> AsyncIterator[GrpcTransport]:
    transport = GrpcTransport(security=Security())
    try:
        yield transport
    finally:
        await transport.close()


async def ping(transport: GrpcTransport, address: str, stamp: int = 7) -> None:
    """Send one ping and check its pong.  Raises the error that comes instead."""
    stream = await transport.connect(address, CONTROL)
    await stream.send(Ping(stamp))
    assert await asyncio.wait_for(stream.receive(), SOON_S) == Pong(stamp)
    await stream.end()


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.01)


def port_of(address: str) -> int:
    return Address.parse(address).port


async def is_closed(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    writer.close()
    return False
