"""A reachable node's part in lending ports: strangers dial one, and the tenant behind a router fetches each of them.

Below TLS: what passes here is between the stranger and the tenant, whose key the stranger has pinned.  A landlord can
hold it up or drop it, and sees how much of it there is; it can neither read nor change it, nor answer as the tenant.
"""

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import Refused
from treeswarm.protocol.address import host_of
from treeswarm.protocol.messages import TICKET_BYTES, FaultCode, IncomingConnection, LeasePort, PortLeased
from treeswarm.transport.rate_limit import RateLimiter
from treeswarm.transport.seam import Stream
from treeswarm_node.config import LendingConfig
from treeswarm_node.reachability.tcp_splice import ByteCounter, End, new_buffer, splice

# Strangers of one tenant that it has not fetched yet.  A tenant fetches within a round trip or two; a client opens
# three connections to a node within one.
WAITING = 64
# A tenant across the world needs a second; a stranger's own patience ends after five (transport/grpc.py).
WAIT_S = 10.0
# Connections at the fetch port that have not said their token yet, in all and of one host: that port is anybody's.
FETCHING, FETCHING_OF_HOST = 128, 64
TOKEN_S = 5.0


@dataclass(eq=False)
class Lease:
    """A lent port and everyone on it."""

    stream: Stream
    limits: LendingConfig
    buffer: memoryview
    wait_s: float
    rate_limiter: RateLimiter | None = None
    server: asyncio.Server | None = None
    refused: int = 0
    """Strangers turned away."""
    _strangers: dict[End, str] = field(default_factory=dict)
    """With their hosts."""
    _waiting: dict[bytes, tuple[End, asyncio.TimerHandle]] = field(default_factory=dict)
    _tokens: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(WAITING))
    _over: bool = False

    def __post_init__(self) -> None:
        self._meter = ByteCounter(self.limits.bytes_per_s, self.rate_limiter)

    @property
    def host(self) -> str:
        """The tenant's."""
        return host_of(self.stream.peer)

    @property
    def connections(self) -> int:
        return len(self._strangers)

    def door(self) -> End:
        """What a stranger finds."""
        return End(self.buffer, made=self._enter, lost=self._leave)

    async def next_token(self) -> bytes:
        """Of a stranger who still waits."""
        while (token := await self._tokens.get()) not in self._waiting:
            pass
        return token

    def fetch(self, token: bytes, tenant: End) -> bool:
        """Join tenant and stranger; False where no stranger has that token, or not any more."""
        found = self._waiting.pop(token, None)
        if found is None:
            return False
        stranger, timer = found
        timer.cancel()
        splice(stranger, tenant, self._meter)
        return True

    def close(self) -> None:
        self._over = True
        if self.server is not None:
            self.server.close()
        for _, timer in self._waiting.values():
            timer.cancel()
        for stranger in self._strangers:
            stranger.transport.abort()
        self._waiting.clear()

    def _enter(self, stranger: End) -> None:
        # The tenant sees all of them come from its own machine; so this is where one host's share can be told.
        hosts = list(self._strangers.values())
        self._strangers[stranger] = stranger.host
        if (
            self._over
            or len(hosts) >= self.limits.connections
            or hosts.count(stranger.host) >= self.limits.connections_of_host
            or self._tokens.full()
        ):
            self.refused += 1
            stranger.transport.abort()
            return
        token = secrets.token_bytes(TICKET_BYTES)
        timer = asyncio.get_running_loop().call_later(self.wait_s, self._give_up, token)
        self._waiting[token] = stranger, timer
        self._tokens.put_nowait(token)

    def _give_up(self, token: bytes) -> None:
        stranger, _ = self._waiting.pop(token)
        stranger.transport.abort()

    def _leave(self, stranger: End) -> None:
        self._strangers.pop(stranger, None)


@dataclass(eq=False)
class PortLender:
    """Lends ports of `host`, the address this node listens on."""

    host: str
    limits: LendingConfig = LendingConfig()
    first_port: int = 0
    """Where only chosen ports are open: tenants fetch here, and the next ones are lent.  0: any that are free."""
    reachable: bool = True
    """Whether strangers reach this node itself: else it has nothing to lend."""
    wait_s: float = WAIT_S
    rate_limiter: RateLimiter | None = None
    """Of all that this node sends, what it passes on included."""
    _tenancies: list[Lease] = field(default_factory=list)
    _fetching: dict[End, asyncio.TimerHandle] = field(default_factory=dict)
    _server: asyncio.Server | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _buffer: memoryview = field(default_factory=new_buffer)

    async def lend(self, wanted: LeasePort, stream: Stream) -> None:
        """Until cancelled, as when the tenant's stream ends.  Raises Refused, TransportError."""
        self._check(wanted, stream)
        tenancy = Lease(stream, self.limits, self._buffer, self.wait_s, self.rate_limiter)
        self._tenancies.append(tenancy)
        try:
            rented = await self._open(tenancy)
            await stream.send(rented)
            while True:
                await stream.send(IncomingConnection(await tenancy.next_token()))
        finally:
            tenancy.close()
            self._tenancies.remove(tenancy)
            if not self._tenancies:
                self._close_fetch_port()

    @property
    def lease_count(self) -> int:
        return len(self._tenancies)

    @property
    def connections(self) -> int:
        """Of strangers, on all ports lent."""
        return sum(tenancy.connections for tenancy in self._tenancies)

    def _check(self, wanted: LeasePort, stream: Stream) -> None:
        most, most_of_host = self.limits.ports, self.limits.ports_to_host
        hosts = Counter(tenancy.host for tenancy in self._tenancies)
        if wanted.version != PROTOCOL_VERSION:
            raise Refused(
                f"protocol {wanted.version} is spoken, this node speaks {PROTOCOL_VERSION}: install the same release",
                FaultCode.WRONG_VERSION,
            )
        if not most or not self.reachable:
            raise Refused("this node lends no ports: ask another", FaultCode.REFUSED)
        if any(tenancy.stream is stream for tenancy in self._tenancies):
            raise Refused("this stream has its port: one stream rents one", FaultCode.REFUSED)
        if len(self._tenancies) >= most:
            raise Refused(f"all {most} ports that this node lends are taken: ask another", FaultCode.TOO_MANY)
        if hosts[host_of(stream.peer)] >= most_of_host:
            raise Refused(
                f"your address rents {most_of_host} ports here, and one may have no more: ask another",
                FaultCode.TOO_MANY,
            )

    async def _open(self, tenancy: Lease) -> PortLeased:
        """Raises Refused."""
        chosen = [0]
        if self.first_port:
            chosen = list(range(self.first_port + 1, self.first_port + 1 + self.limits.ports))
        try:
            async with self._opening:
                if self._server is None:
                    self._server = await self._listen([self.first_port], self._fetch_door)
                    await self._server.start_serving()
                tenancy.server = await self._listen(chosen, tenancy.door)
                await tenancy.server.start_serving()
        except OSError as error:
            raise Refused(f"no port can be opened here ({error.strerror}): ask another", FaultCode.REFUSED) from None
        return PortLeased(_port_of(tenancy.server), _port_of(self._server))

    async def _listen(self, ports: list[int], door: Callable[[], End]) -> asyncio.Server:
        """At the first of the ports that is free; does not accept yet.  Raises OSError."""
        for port in ports[:-1]:
            with contextlib.suppress(OSError):
                return await self._bind(port, door)
        return await self._bind(ports[-1], door)

    async def _bind(self, port: int, door: Callable[[], End]) -> asyncio.Server:
        # Serving from the start would wait once more with the port open: a port nobody could close if cancelled there.
        loop = asyncio.get_running_loop()
        return await loop.create_server(door, self.host, port, start_serving=False)

    def _fetch_door(self) -> End:
        """Anybody may dial it; a token that was told over a tenant's own stream says who it is.  Heard on its way by a
        third, it would give them a connection in the middle of which they are already."""
        return End(
            self._buffer, made=self._enter_fetching, lost=self._give_up, greeting=TICKET_BYTES, greeted=self._fetch
        )

    def _enter_fetching(self, end: End) -> None:
        hosts = [other.host for other in self._fetching]
        if len(hosts) >= FETCHING or hosts.count(end.host) >= FETCHING_OF_HOST:
            end.transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._fetching[end] = loop.call_later(TOKEN_S, end.transport.abort)

    def _fetch(self, end: End, token: bytes) -> None:
        self._give_up(end)
        if not any(tenancy.fetch(token, end) for tenancy in self._tenancies):
            end.transport.abort()

    def _give_up(self, end: End) -> None:
        timer = self._fetching.pop(end, None)
        if timer is not None:
            timer.cancel()

    def _close_fetch_port(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for end in list(self._fetching):
            end.transport.abort()


def _port_of(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])
