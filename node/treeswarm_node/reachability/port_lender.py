"""The lender's side of leased ports: remote machines dial a port here, and the borrower fetches each connection.

This works below TLS.  What passes here is between the remote machine and the borrower, whose key the remote machine has
pinned.  A lender can delay it or drop it, and sees how much of it there is.  It can neither read nor change it, nor
answer in the borrower's place.
"""

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from treeswarm.errors import Refused
from treeswarm.protocol.address import host_of
from treeswarm.protocol.messages import TICKET_BYTES, FaultCode
from treeswarm.protocol.node_messages import IncomingConnection, LeasePort, PortLeased
from treeswarm.protocol.version import check_version
from treeswarm.transport.rate_limit import RateLimiter
from treeswarm.transport.seam import Stream
from treeswarm_node.config import LendingConfig
from treeswarm_node.reachability.tcp_splice import ByteCounter, SpliceEnd, new_buffer, splice

# Connections of one lease that are not fetched yet.  A borrower fetches within a round trip or two; a client opens
# three connections to a node within one.
MAX_WAITING = 64
# A borrower across the world needs a second; a remote machine's own patience ends after five (transport/grpc.py).
WAIT_S = 10.0
# Connections at the fetch port that have not sent their token yet, in all and of one host: any machine may dial it.
MAX_FETCHING, MAX_FETCHING_OF_HOST = 128, 64
TOKEN_S = 5.0


@dataclass(eq=False)
class Lease:
    """One lent port and all connections on it."""

    stream: Stream
    """The borrower's control stream, with which the lease ends."""
    limits: LendingConfig
    buffer: memoryview
    wait_s: float
    """Seconds that an incoming connection waits to be fetched."""
    counter: ByteCounter
    server: asyncio.Server | None = None
    refused: int = 0
    """Number of incoming connections refused."""
    _hosts: dict[SpliceEnd, str] = field(default_factory=dict)
    """Open incoming connections, each with its remote host."""
    _waiting: dict[bytes, tuple[SpliceEnd, asyncio.TimerHandle]] = field(default_factory=dict)
    """Incoming connections that are not fetched yet, by token."""
    _tokens: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(MAX_WAITING))
    _closed: bool = False

    @property
    def host(self) -> str:
        """Host of the borrower."""
        return host_of(self.stream.peer)

    @property
    def connections(self) -> int:
        """Number of open incoming connections."""
        return len(self._hosts)

    def new_end(self) -> SpliceEnd:
        """Return the protocol for a new connection to the lent port."""
        return SpliceEnd(self.buffer, on_connected=self._add, on_lost=self._remove)

    async def next_token(self) -> bytes:
        """Return the token of the next connection that still waits to be fetched."""
        while (token := await self._tokens.get()) not in self._waiting:
            pass
        return token

    def fetch(self, token: bytes, borrower: SpliceEnd) -> bool:
        """Join the borrower to the connection that has the token; return False if none has it any more."""
        entry = self._waiting.pop(token, None)
        if entry is None:
            return False
        remote, timer = entry
        timer.cancel()
        splice(remote, borrower, self.counter)
        return True

    def close(self) -> None:
        """Close the port and all its connections."""
        self._closed = True
        if self.server is not None:
            self.server.close()
        for _, timer in self._waiting.values():
            timer.cancel()
        for remote in self._hosts:
            remote.transport.abort()
        self._waiting.clear()

    def _add(self, remote: SpliceEnd) -> None:
        # To the borrower, all connections come from its own machine: only here can one host's share be limited.
        hosts = list(self._hosts.values())
        self._hosts[remote] = remote.host
        if (
            self._closed
            or len(hosts) >= self.limits.connections
            or hosts.count(remote.host) >= self.limits.connections_of_host
            or self._tokens.full()
        ):
            self.refused += 1
            remote.transport.abort()
            return
        token = secrets.token_bytes(TICKET_BYTES)
        timer = asyncio.get_running_loop().call_later(self.wait_s, self._give_up, token)
        self._waiting[token] = remote, timer
        self._tokens.put_nowait(token)

    def _give_up(self, token: bytes) -> None:
        remote, _ = self._waiting.pop(token)
        remote.transport.abort()

    def _remove(self, remote: SpliceEnd) -> None:
        self._hosts.pop(remote, None)


@dataclass(eq=False)
class PortLender:
    """Lends ports of `host`, the address on which this node listens."""

    host: str
    limits: LendingConfig = LendingConfig()
    reachable: bool = True
    """Whether remote machines reach this node itself.  Otherwise it has nothing to lend."""
    wait_s: float = WAIT_S
    """Seconds that an incoming connection waits to be fetched."""
    rate_limiter: RateLimiter | None = None
    """Rate of everything that this node sends, including what it passes on; None if it is not limited."""
    _leases: list[Lease] = field(default_factory=list)
    _fetching: dict[SpliceEnd, asyncio.TimerHandle] = field(default_factory=dict)
    """Connections at the fetch port that have not sent their token yet."""
    _fetch_server: asyncio.Server | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _buffer: memoryview = field(default_factory=new_buffer)

    async def lend(self, request: LeasePort, stream: Stream) -> None:
        """Lend a port until cancelled, as happens when the borrower's stream ends.  Raises Refused, TransportError."""
        self._check(request, stream)
        counter = ByteCounter(self.limits.bytes_per_s, self.rate_limiter)
        lease = Lease(stream, self.limits, self._buffer, self.wait_s, counter)
        self._leases.append(lease)
        try:
            await stream.send(await self._open(lease))
            while True:
                await stream.send(IncomingConnection(await lease.next_token()))
        finally:
            lease.close()
            self._leases.remove(lease)
            if not self._leases:
                self._close_fetch_port()

    @property
    def lease_count(self) -> int:
        """Number of ports lent now."""
        return len(self._leases)

    @property
    def connections(self) -> int:
        """Number of open incoming connections on all lent ports."""
        return sum(lease.connections for lease in self._leases)

    def _check(self, request: LeasePort, stream: Stream) -> None:
        most, most_of_host = self.limits.ports, self.limits.ports_to_host
        hosts = Counter(lease.host for lease in self._leases)
        check_version("the borrower", request.version)
        if not most or not self.reachable:
            raise Refused("this node lends no ports: ask another", FaultCode.REFUSED)
        if any(lease.stream is stream for lease in self._leases):
            raise Refused("this stream has leased a port already: one stream leases one", FaultCode.REFUSED)
        if len(self._leases) >= most:
            raise Refused(f"all {most} ports that this node lends are leased: ask another node", FaultCode.TOO_MANY)
        if hosts[host_of(stream.peer)] >= most_of_host:
            raise Refused(
                f"your address leases {most_of_host} ports here, the most that one may lease: ask another node",
                FaultCode.TOO_MANY,
            )

    async def _open(self, lease: Lease) -> PortLeased:
        """Open the lent port, and the fetch port if it is closed.  Raises Refused."""
        first = self.limits.first_port
        lent_ports = list(range(first + 1, first + 1 + self.limits.ports)) if first else [0]
        try:
            async with self._opening:
                if self._fetch_server is None:
                    self._fetch_server = await self._listen([first], self._new_fetch_end)
                    await self._fetch_server.start_serving()
                lease.server = await self._listen(lent_ports, lease.new_end)
                await lease.server.start_serving()
        except OSError as error:
            raise Refused(
                f"no port can be opened here ({error.strerror}): ask another node", FaultCode.REFUSED
            ) from None
        return PortLeased(_bound_port(lease.server), _bound_port(self._fetch_server))

    async def _listen(self, ports: list[int], new_end: Callable[[], SpliceEnd]) -> asyncio.Server:
        """Listen on the first of the ports that is free, without accepting yet.  Raises OSError."""
        for port in ports[:-1]:
            with contextlib.suppress(OSError):
                return await self._bind(port, new_end)
        return await self._bind(ports[-1], new_end)

    async def _bind(self, port: int, new_end: Callable[[], SpliceEnd]) -> asyncio.Server:
        # Serving from the start would wait once more with the port open.  If cancelled there, nothing could close it.
        loop = asyncio.get_running_loop()
        return await loop.create_server(new_end, self.host, port, start_serving=False)

    def _new_fetch_end(self) -> SpliceEnd:
        """Return the protocol for a new connection to the fetch port.

        Any machine may dial that port.  A token, which was sent on a borrower's own stream, identifies the borrower.
        A third party that overhears the token gains a connection through which it must already sit.
        """
        return SpliceEnd(
            self._buffer,
            on_connected=self._add_fetching,
            on_lost=self._remove_fetching,
            greeting_bytes=TICKET_BYTES,
            on_greeting=self._fetch,
        )

    def _add_fetching(self, end: SpliceEnd) -> None:
        hosts = [other.host for other in self._fetching]
        if len(hosts) >= MAX_FETCHING or hosts.count(end.host) >= MAX_FETCHING_OF_HOST:
            end.transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._fetching[end] = loop.call_later(TOKEN_S, end.transport.abort)

    def _fetch(self, end: SpliceEnd, token: bytes) -> None:
        self._remove_fetching(end)
        if not any(lease.fetch(token, end) for lease in self._leases):
            end.transport.abort()

    def _remove_fetching(self, end: SpliceEnd) -> None:
        timer = self._fetching.pop(end, None)
        if timer is not None:
            timer.cancel()

    def _close_fetch_port(self) -> None:
        if self._fetch_server is not None:
            self._fetch_server.close()
            self._fetch_server = None
        for end in list(self._fetching):
            end.transport.abort()


def _bound_port(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])
