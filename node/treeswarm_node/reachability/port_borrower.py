"""The part of a node that strangers cannot dial: it rents a port of one that they can, and fetches who comes there."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, Malformed, SwarmError, Unreachable
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import IncomingConnection, LeasePort, PortLeased
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.reachability.tcp_splice import End, new_buffer, splice

# A landlord answers at once or is in trouble.
RENT_S = 10.0
# Beyond it the landlord has given the stranger up.
FETCH_S = 10.0
# A landlord may tell of strangers as many as it likes; this is what a tenant fetches.
CONNECTIONS = 512
# A dead landlord takes no goodbye.
GOODBYE_S = 1.0


@dataclass(eq=False)
class LeasedPort:
    """In use until `rent` is left."""

    address: str
    """What strangers dial.  They find this node there, under its own pin."""
    forwarded_ports: set[int]
    """The local ports that those who are connected through it seem to come from."""
    _stream: Stream
    _fetch_at: Address
    _local: Address
    _buffer: memoryview = field(default_factory=new_buffer)
    _ends: set[End] = field(default_factory=set)
    _fetches: set[asyncio.Task[None]] = field(default_factory=set)

    async def wait_until_lost(self) -> None:
        """Raises LinkBroken or Refused once the port is lost; never returns."""
        await asyncio.shield(self._listening)

    def start(self) -> None:
        self._listening = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        self._listening.cancel()
        for fetch in self._fetches:
            fetch.cancel()
        await asyncio.gather(self._listening, *self._fetches, return_exceptions=True)
        for end in list(self._ends):
            end.transport.abort()

    async def _listen(self) -> None:
        try:
            while (message := await self._stream.receive()) is not None:
                if not isinstance(message, IncomingConnection):
                    raise Malformed(f"a landlord sent {type(message).__name__}")
                if len(self._fetches) + len(self._ends) // 2 < CONNECTIONS:
                    fetch = asyncio.create_task(self._fetch(message.token))
                    self._fetches.add(fetch)
                    fetch.add_done_callback(self._fetches.discard)
            raise LinkBroken("the landlord has ended the tenancy")
        finally:
            for end in list(self._ends):
                end.transport.abort()

    async def _fetch(self, token: bytes) -> None:
        """A stranger that cannot be fetched is told by the silence: nobody here knows who it is."""
        ends: list[End] = []
        try:
            async with asyncio.timeout(FETCH_S):
                ends.append(await self._dial(self._local, self._forget_guest))
                self.forwarded_ports.add(ends[0].own_port)
                ends.append(await self._dial(self._fetch_at, self._ends.discard))
        except OSError:  # TimeoutError too
            for end in ends:
                end.transport.abort()
        else:
            inner, outer = ends
            outer.transport.write(token)
            splice(inner, outer)

    async def _dial(self, address: Address, lost: Callable[[End], None]) -> End:
        loop = asyncio.get_running_loop()
        end = End(self._buffer, lost=lost)
        await loop.create_connection(lambda: end, address.host, address.port)
        self._ends.add(end)
        return end

    def _forget_guest(self, end: End) -> None:
        self._ends.discard(end)
        self.forwarded_ports.discard(end.own_port)


@contextlib.asynccontextmanager
async def lease_port(
    transport: Transport, landlord: str, local: str, forwarded_ports: set[int] | None = None
) -> AsyncIterator[LeasedPort]:
    """A port of `landlord`, whose visitors are led to `local`, where this node listens; given back on leaving.

    `guests` is kept up to date, see LeasedPort.  Raises Unreachable, Impostor, LinkBroken, or Refused with the
    landlord's words.
    """
    stream = await transport.connect(landlord, StreamKind.CONTROL)
    port: LeasedPort | None = None
    try:
        rented, host = await _ask(stream, landlord), Address.parse(landlord).host
        port = LeasedPort(
            address=Address(host, rented.port).bare,
            forwarded_ports=set() if forwarded_ports is None else forwarded_ports,
            _stream=stream,
            _fetch_at=Address(host, rented.fetch_port),
            _local=Address.parse(local),
        )
        port.start()
        yield port
    finally:
        if port is not None:
            await port.stop()
        with contextlib.suppress(SwarmError, TimeoutError):
            await asyncio.wait_for(stream.end(), GOODBYE_S)


async def _ask(stream: Stream, landlord: str) -> PortLeased:
    try:
        async with asyncio.timeout(RENT_S):
            await stream.send(LeasePort(PROTOCOL_VERSION))
            said = await stream.receive()
    except TimeoutError:
        raise Unreachable(f"{landlord} did not answer within {RENT_S:.0f} s whether it lends a port") from None
    if said is None:
        raise LinkBroken(f"{landlord} ended the stream on which a port was asked of it")
    if not isinstance(said, PortLeased):
        raise Malformed(f"{landlord} answered a wish to rent with {type(said).__name__}")
    return said
