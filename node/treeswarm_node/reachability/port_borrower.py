"""The borrower's side of a leased port: a node that cannot be dialled fetches the connections to a lender's port."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, Malformed, SwarmError, Unreachable
from treeswarm.protocol.address import Address
from treeswarm.protocol.node_messages import IncomingConnection, LeasePort, PortLeased
from treeswarm.tasks import STAGGER_S, TaskSet
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.reachability.tcp_splice import SpliceEnd, new_buffer, splice

# A port lender answers at once, or it is in trouble.
LEASE_S = 10.0
# After this time the lender has given up the incoming connection.
FETCH_S = 10.0
# A lender may announce as many connections as it likes; the borrower fetches no more than this at a time.
MAX_CONNECTIONS = 512
# A dead lender does not confirm the end of the stream.
END_S = 1.0


@dataclass(eq=False)
class LeasedPort:
    """A port on another node that leads to this one.  It is in use until the context of `lease_port` is left."""

    address: str
    """`host:port` that other machines dial.  They find this node there, under its own pin."""
    forwarded_ports: set[int]
    """Local ports from which the connections through the leased port seem to come."""
    _stream: Stream
    _fetch_at: Address
    """The lender's fetch port."""
    _local: Address
    """Address on which this node listens."""
    _buffer: memoryview = field(default_factory=new_buffer)
    _ends: set[SpliceEnd] = field(default_factory=set)
    _fetches: TaskSet = field(default_factory=TaskSet)

    async def wait_until_lost(self) -> None:
        """Raise LinkBroken, Refused or Malformed once the port is lost; never return."""
        await asyncio.shield(self._listening)

    def start(self) -> None:
        """Begin to fetch connections."""
        self._listening = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """Close all connections, and fetch no more."""
        self._listening.cancel()
        self._fetches.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        await self._fetches.join()
        self._abort_all()

    async def _listen(self) -> None:
        try:
            while (message := await self._stream.receive()) is not None:
                if not isinstance(message, IncomingConnection):
                    raise Malformed(f"a port lender sent {type(message).__name__}")
                if len(self._fetches) + len(self._ends) // 2 < MAX_CONNECTIONS:
                    self._fetches.start(self._fetch(message.token))
            raise LinkBroken("the port lender has ended the lease")
        finally:
            self._abort_all()

    async def _fetch(self, token: bytes) -> None:
        """Fetch one connection.  If that fails, the remote machine gets no reply: this node does not know its name."""
        ends: list[SpliceEnd] = []
        try:
            async with asyncio.timeout(FETCH_S):
                ends.append(await self._dial(self._local, self._remove_forwarded))
                self.forwarded_ports.add(ends[0].own_port)
                ends.append(await self._dial(self._fetch_at, self._ends.discard))
        except OSError:  # TimeoutError is one too.
            for end in ends:
                end.transport.abort()
        else:
            inner, outer = ends
            outer.transport.write(token)
            splice(inner, outer)

    async def _dial(self, address: Address, on_lost: Callable[[SpliceEnd], None]) -> SpliceEnd:
        loop = asyncio.get_running_loop()
        end = SpliceEnd(self._buffer, on_lost=on_lost)
        await loop.create_connection(lambda: end, address.host, address.port, happy_eyeballs_delay=STAGGER_S)
        self._ends.add(end)
        return end

    def _remove_forwarded(self, end: SpliceEnd) -> None:
        self._ends.discard(end)
        self.forwarded_ports.discard(end.own_port)

    def _abort_all(self) -> None:
        for end in list(self._ends):
            end.transport.abort()


@contextlib.asynccontextmanager
async def lease_port(
    transport: Transport, lender: str, local: str, forwarded_ports: set[int] | None = None
) -> AsyncIterator[LeasedPort]:
    """Lease a port of the node at `lender`; its connections are led to `local`, where this node listens.

    The lease ends with the context.  `forwarded_ports` is kept up to date, see LeasedPort.  Raises Unreachable,
    Impostor, LinkBroken, or Refused with the lender's reason.
    """
    stream = await transport.connect(lender, StreamKind.CONTROL)
    port: LeasedPort | None = None
    try:
        leased, host = await _request_lease(stream, lender), Address.parse(lender).host
        port = LeasedPort(
            address=Address(host, leased.port).bare,
            forwarded_ports=set() if forwarded_ports is None else forwarded_ports,
            _stream=stream,
            _fetch_at=Address(host, leased.fetch_port),
            _local=Address.parse(local),
        )
        port.start()
        yield port
    finally:
        if port is not None:
            await port.stop()
        with contextlib.suppress(SwarmError, TimeoutError):
            await asyncio.wait_for(stream.end(), END_S)


async def _request_lease(stream: Stream, lender: str) -> PortLeased:
    try:
        async with asyncio.timeout(LEASE_S):
            await stream.send(LeasePort(PROTOCOL_VERSION))
            reply = await stream.receive()
    except TimeoutError:
        raise Unreachable(f"{lender} did not answer within {LEASE_S:.0f} s whether it lends a port") from None
    if reply is None:
        raise LinkBroken(f"{lender} ended the stream on which a port was requested")
    if not isinstance(reply, PortLeased):
        raise Malformed(f"{lender} answered a request for a port with {type(reply).__name__}")
    return reply
