"""Find the address under which other machines reach this node.

The address is the one its owner announced, the one where other nodes could dial it, or a port leased from another node.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from treeswarm.errors import SwarmError
from treeswarm.protocol.address import Address, is_loopback
from treeswarm.protocol.node_messages import DialBack, DialledBack
from treeswarm.transport.seam import StreamKind, Transport
from treeswarm.transport.tls import check_pin, fetch_certificate
from treeswarm_node.reachability.port_borrower import LeasedPort, lease_port

log = logging.getLogger(__name__)

# Number of nodes whose answers decide whether this node is reachable.  With three, one that lies or is in the same home
# network decides nothing.
ANSWERS = 3
# Two failed dials at the other end, of five seconds each (transport/grpc.py), and the way there and back.
ASK_S = 15.0
# Number of nodes that are asked whether they reach this one, and number of port lenders tried, before the next pause.
# Some of them lease a port themselves: they can neither answer nor lend.
MAX_TRIED = 8
# Shorter than a remote machine's own patience.
CHECK_S = 10.0
# Routers and lines seldom change: whether this node can be dialled is checked again after this time.
CHECK_EVERY_S = 600.0
# A node that can answer, or lend a port, may join at any moment.
RETRY_S = 10.0
# All borrowers of a port lender lose their ports at the same moment, so each waits a random time up to this.
SPREAD_S = 1.0
ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Wildcard hosts to listen on, each with the host that dials such a listener from the same machine."""


class Basis(StrEnum):
    """The reason for which a node announces an address."""

    ANNOUNCED = "announced"
    """The owner gave the address."""
    DIALLED = "dialled"
    """Other nodes have dialled it with success."""
    LEASED = "leased"
    """The address is a port leased from another node."""
    ASSUMED = "assumed"
    """No other node could answer whether it reaches this one."""
    HIDDEN = "hidden"
    """Other machines cannot dial this node, and no node lends it a port."""


@dataclass(frozen=True)
class PublicAddress:
    """The address that a node announces."""

    address: str
    """`host:port`, without a pin."""
    basis: Basis
    reachable: bool
    """Whether another node has dialled the address, or this node has done so from outside."""

    @property
    def lends(self) -> bool:
        """Whether ports of this node may be of use to others.

        The first node of a swarm has no other node that could tell.  Its borrowers check for themselves whether the
        port leads to them.
        """
        return self.basis not in {Basis.LEASED, Basis.HIDDEN}


@dataclass(frozen=True)
class DialResult:
    """What one node answered when it was asked to dial this one."""

    reached: bool
    address: str = ""
    """Address at which it reached this node, or "" if it did not."""


def decide_address(announced: str | None, assumed: str, results: Sequence[DialResult]) -> PublicAddress | None:
    """Decide under which address this node is announced, or None if it needs a leased port.  Pure.

    `announced` is the owner's address, if any.  `assumed` is where this machine believes that it can be reached.
    A result that names a loopback address comes from the same machine.  It says nothing about other machines, so it is
    ignored unless the node is on the loopback interface itself.
    """
    reached = Counter(result.address for result in results if result.reached)
    if announced is not None:
        return PublicAddress(announced_address(announced, assumed).bare, Basis.ANNOUNCED, bool(reached))
    on_loopback = is_loopback(Address.parse(assumed).host)
    counted = [r for r in results if on_loopback or not (r.reached and is_loopback(Address.parse(r.address).host))]
    if not counted:
        return PublicAddress(Address.parse(assumed).bare, Basis.ASSUMED, bool(reached))
    votes = Counter(result.address for result in counted if result.reached)
    address, most = max(votes.items(), key=lambda vote: vote[1], default=("", 0))
    return PublicAddress(address, Basis.DIALLED, True) if 2 * most > len(counted) else None


def describe_address(public: PublicAddress) -> str:
    """Return the log line that says who finds the node at an address."""
    if is_loopback(Address.parse(public.address).host):
        return f"only programs on this machine find this node at {public.address}"
    return f"other machines find this node at {public.address} ({public.basis})"


def announced_address(announced: str, listening: str) -> Address:
    """Return the owner's address; port 0 in it stands for the port that the node listens on."""
    address = Address.parse(announced)
    return Address(address.host, address.port or Address.parse(listening).port)


async def ask_dial_back(transport: Transport, node: str, own: str) -> DialResult | None:
    """Ask the node at address `node` to dial `own`; return None if it cannot answer.

    The host 0.0.0.0 in `own` stands for the host from which this node's connection seems to come.
    """
    try:
        async with asyncio.timeout(ASK_S):
            stream = await transport.connect(node, StreamKind.CONTROL)
            try:
                await stream.send(DialBack(own))
                reply = await stream.receive()
            finally:
                await stream.end()
        if not isinstance(reply, DialledBack):
            return None
        reached_at = Address.parse(reply.why) if reply.reached else None
        if reached_at is None or reached_at.port != Address.parse(own).port:
            return DialResult(False)
        return DialResult(True, reached_at.bare)
    except (SwarmError, TimeoutError):
        return None


@dataclass(eq=False)
class AddressMonitor:
    """Finds this node's public address and keeps it current while port lenders come and go."""

    transport: Transport
    listening: str
    """`host:port` on which this node listens."""
    pin: str
    """Pin of this node's key."""
    lender_candidates: Callable[[], Awaitable[Sequence[str]]]
    """Return the addresses, with pins, of all other nodes, the best port lender first (docs/benchmarks.md).  Nodes that
    are not known to be reachable belong to them: in a young swarm no node knows yet which ones are."""
    on_address: Callable[[PublicAddress], Awaitable[None]]
    """Called with the public address when it is found, and whenever it changes."""
    announced: str | None = None
    """`host:port` that the owner announced, or None."""
    forwarded_ports: set[int] = field(default_factory=set)
    """The node's own set of forwarded ports, see `lease_port`."""
    assumed: str = ""
    """`host:port` where this machine believes that it can be reached; "" means `listening`."""
    current: PublicAddress | None = None
    """Public address found last, or None before the first."""
    _lost_lender: str | None = None
    """Address of the port lender whose lease was lost last, which is asked last."""

    def __post_init__(self) -> None:
        self.assumed = self.assumed or self.listening

    async def run(self) -> None:
        """Keep the public address current until cancelled; a leased port is then given back."""
        while True:
            address = await self.find_address()
            if address is not None:
                await self._set_address(address)
                await _sleep_about(CHECK_EVERY_S if address.reachable else RETRY_S)
                continue
            until = asyncio.get_running_loop().time() + CHECK_EVERY_S
            while asyncio.get_running_loop().time() < until:
                if not await self._lease_from_any():
                    await self._set_address(PublicAddress(Address.parse(self.assumed).bare, Basis.HIDDEN, False))
                    await _sleep_about(RETRY_S)

    async def find_address(self) -> PublicAddress | None:
        """Ask some other nodes to dial this one and decide; return None if a port must be leased."""
        own = self._pinned(Address("0.0.0.0", Address.parse(self.listening).port))
        if self.announced is not None:
            own = self._pinned(announced_address(self.announced, self.listening))
        nodes = list(await self.lender_candidates())
        remaining, results = random.sample(nodes, min(MAX_TRIED, len(nodes))), list[DialResult]()
        while remaining and len(results) < ANSWERS:
            batch, remaining = remaining[:ANSWERS], remaining[ANSWERS:]
            answers = await asyncio.gather(*(ask_dial_back(self.transport, node, own) for node in batch))
            results += [result for result in answers if result is not None]
        return decide_address(self.announced, self.assumed, results)

    async def _lease_from_any(self) -> bool:
        """Lease a port and keep it until it is lost; return False if no node lends one."""
        lenders = sorted(await self.lender_candidates(), key=lambda lender: lender == self._lost_lender)
        for lender in lenders[:MAX_TRIED]:
            if await self._lease_from(lender):
                self._lost_lender = lender
                await asyncio.sleep(random.uniform(0.0, SPREAD_S))
                return True
        return False

    async def _lease_from(self, lender: str) -> bool:
        """Return whether this node lent a port, which is lost by the time of the return."""
        leased = False
        try:
            async with lease_port(self.transport, lender, local_address(self.listening), self.forwarded_ports) as port:
                await self._check(port)
                await self._set_address(PublicAddress(port.address, Basis.LEASED, True))
                leased = True
                while True:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(CHECK_EVERY_S):
                            await port.wait_until_lost()
                    await self._check(port)
        except SwarmError as error:
            log.info("%s %s: %s", "lost the port leased from" if leased else "no port leased from", lender, error)
        return leased

    async def _check(self, port: LeasedPort) -> None:
        """Dial the port as a remote machine does: this node's own key must answer.  Raises Unreachable, Impostor."""
        address = Address.parse(self._pinned(Address.parse(port.address)))
        check_pin(address, await fetch_certificate(address, CHECK_S))

    async def _set_address(self, address: PublicAddress) -> None:
        if address != self.current:
            self.current = address
            log.info("%s", describe_address(address))
            await self.on_address(address)

    def _pinned(self, address: Address) -> str:
        return str(Address(address.host, address.port, self.pin))


def local_address(listening: str) -> str:
    """Return the `host:port` at which programs of this machine reach a node that listens on `listening`."""
    bound = Address.parse(listening)
    return Address(ANY_HOSTS.get(bound.host, bound.host), bound.port).bare


async def _sleep_about(seconds: float) -> None:
    """Sleep with jitter, so that nodes started together do not ask together every time."""
    await asyncio.sleep(seconds * random.uniform(0.8, 1.2))
