"""Nodes without a model on loopback, and strangers."""

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
# All of a test come from one host.
OPEN_HANDED = LendingConfig(ports=8, ports_to_host=8)
SOON_S = 20.0


@dataclass(eq=False)
class Peer:
    """A node without a model, listening on loopback."""

    node: NodeServer
    transport: GrpcTransport
    pin: str
    local: str = ""
    """Its address."""
    heard: asyncio.Queue[Message | None] = field(default_factory=asyncio.Queue)
    """Of links."""

    @property
    def address(self) -> str:
        return f"{self.local}#{self.pin}"

    @property
    def port_lender(self) -> PortLender:
        assert self.node.port_lender is not None
        return self.node.port_lender


@contextlib.asynccontextmanager
async def peer(limits: LendingConfig = OPEN_HANDED, **landlord: object) -> AsyncIterator[Peer]:
    identity = Identity.ephemeral()
    transport = GrpcTransport(security=Security(identity))
    node = NodeServer(transport, port_lender=PortLender("127.0.0.1", limits, **landlord))  # type: ignore[arg-type]
    made = Peer(node, transport, identity.pin)

    async def accept(kind: StreamKind, stream: Stream) -> None:
        if kind is CONTROL:
            await node.accept(kind, stream)
            return
        while (message := await stream.receive()) is not None:
            await made.heard.put(message)
        await made.heard.put(None)

    listener = await transport.listen("127.0.0.1:0", accept)
    made.local = listener.address
    try:
        yield made
    finally:
        await listener.close()
        await transport.close()


@contextlib.asynccontextmanager
async def stranger() -> AsyncIterator[GrpcTransport]:
    transport = GrpcTransport(security=Security())
    try:
        yield transport
    finally:
        await transport.close()


async def ask(transport: GrpcTransport, address: str, stamp: int = 7) -> None:
    """One ping and its pong; raises whatever comes instead."""
    stream = await transport.connect(address, CONTROL)
    await stream.send(Ping(stamp))
    assert await asyncio.wait_for(stream.receive(), SOON_S) == Pong(stamp)
    await stream.end()


async def until(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON_S):
        while not happened():
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
