"""Where strangers find this node: as its owner says, where others can dial it, or at a port rented from another."""

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
from treeswarm.protocol.messages import DialBack, DialledBack
from treeswarm.transport.seam import StreamKind, Transport
from treeswarm.transport.tls import check_pin, fetch_certificate
from treeswarm_node.reachability.port_borrower import RentedPort, rent

log = logging.getLogger(__name__)

# Whose word counts for whether strangers reach this node: of three, one that lies or is on the same home network
# decides nothing.
ASKED = 3
# Two dials in vain at the other end, of five seconds each (transport/grpc.py), and the way there and back.
ASK_S = 15.0
# Nodes that are asked whether they reach this one, and landlords tried, before the matter rests a while: some of them
# rent a port themselves, and can neither say nor lend.
TRIED = 8
# Strangers lose patience earlier.
CHECK_S = 10.0
# Routers and lines seldom change; a node that could be dialled, or could not, is looked at again after this.
CHECK_EVERY_S = 600.0
# Somebody who can say, or who lends, may come any moment.
RETRY_S = 10.0
# A landlord's tenants lose their ports at the same moment.
SPREAD_S = 1.0
ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""With what such a listener is dialled from its own machine."""


class Basis(StrEnum):
    """On what grounds."""

    ANNOUNCED = "announced"
    """By the owner."""
    DIALLED = "dialled"
    """Others have reached it there."""
    RENTED = "rented"
    ASSUMED = "assumed"
    """Nobody could be asked."""
    HIDDEN = "hidden"
    """Others cannot reach it, and nobody lends a port."""


@dataclass(frozen=True)
class PublicAddress:
    """What a node tells others."""

    address: str
    """Without a pin."""
    how: Basis
    reachable: bool
    """Another node has dialled it, or this one did from outside."""

    @property
    def lends(self) -> bool:
        """Whether its ports may be of use to others.  The first node of a swarm has nobody to tell it; its tenants look
        themselves whether the port leads to them."""
        return self.how not in {Basis.RENTED, Basis.HIDDEN}


@dataclass(frozen=True)
class DialResult:
    """What one node says of this one."""

    reached: bool
    address: str = ""
    """Where it reached it."""


def decide_address(announced: str | None, assumed: str, verdicts: Sequence[DialResult]) -> PublicAddress | None:
    """None: strangers cannot reach this node, it needs a port of another.  `assumed` is where this machine believes to
    be reached.  Pure.

    A neighbour on the same machine sees the loopback: no address for anybody else, and no word on what strangers reach.
    """
    reached = Counter(verdict.address for verdict in verdicts if verdict.reached)
    if announced is not None:
        return PublicAddress(announced_address(announced, assumed).bare, Basis.ANNOUNCED, bool(reached))
    here = is_loopback(Address.parse(assumed).host)
    said = [v for v in verdicts if here or not (v.reached and is_loopback(Address.parse(v.address).host))]
    if not said:
        return PublicAddress(Address.parse(assumed).bare, Basis.ASSUMED, bool(reached))
    votes = Counter(verdict.address for verdict in said if verdict.reached)
    address, most = max(votes.items(), key=lambda found: found[1], default=("", 0))
    return PublicAddress(address, Basis.DIALLED, True) if 2 * most > len(said) else None


def announced_address(announced: str, listening: str) -> Address:
    """Port 0 is the one listened on."""
    told = Address.parse(announced)
    return Address(told.host, told.port or Address.parse(listening).port)


async def verdict_of(transport: Transport, asked: str, own: str) -> DialResult | None:
    """Whether `asked` can dial `own`, which with the host 0.0.0.0 is whatever host this node seems to be to it; None
    if it cannot say."""
    try:
        async with asyncio.timeout(ASK_S):
            stream = await transport.connect(asked, StreamKind.CONTROL)
            try:
                await stream.send(DialBack(own))
                said = await stream.receive()
            finally:
                await stream.end()
        if not isinstance(said, DialledBack):
            return None
        reached_at = Address.parse(said.why) if said.reached else None
        if reached_at is None or reached_at.port != Address.parse(own).port:
            return DialResult(False)
        return DialResult(True, reached_at.bare)
    except (SwarmError, TimeoutError):
        return None


async def is_reachable(transport: Transport, asked: str, own: str) -> bool | None:
    """Whether the node at `asked` can dial `own`; None if it cannot say."""
    verdict = await verdict_of(transport, asked, own)
    return None if verdict is None else verdict.reached


@dataclass(eq=False)
class AddressMonitor:
    """`run` finds this node's place and keeps it, while landlords come and go."""

    transport: Transport
    listening: str
    """`host:port` as bound."""
    pin: str
    """Of this node."""
    others: Callable[[], Awaitable[Sequence[str]]]
    """Addresses, with pins, of other nodes: the best landlord first, see docs/benchmarks.md.  All of them, for in a
    young swarm nobody knows of anybody yet whether strangers reach it."""
    settled: Callable[[PublicAddress], Awaitable[None]]
    """Called with the place when it is found, and when it changes."""
    announced: str | None = None
    guests: set[int] = field(default_factory=set)
    """The node's own, see `tenant.rent`."""
    assumed: str = ""
    """Where this machine believes to be reached; empty: where it listens."""
    place: PublicAddress | None = None
    _lost_by: str | None = None
    """The landlord that went, or lost its line: asked last."""

    def __post_init__(self) -> None:
        self.assumed = self.assumed or self.listening

    async def run(self) -> None:
        """Until cancelled; a rented port is then given back."""
        while True:
            place = await self.find()
            if place is not None:
                await self._settle(place)
                await _sleep(CHECK_EVERY_S if place.reachable else RETRY_S)
                continue
            until = asyncio.get_running_loop().time() + CHECK_EVERY_S
            while asyncio.get_running_loop().time() < until:
                if not await self._rent_somewhere():
                    await self._settle(PublicAddress(Address.parse(self.assumed).bare, Basis.HIDDEN, False))
                    await _sleep(RETRY_S)

    async def find(self) -> PublicAddress | None:
        """Ask some others and decide; None: a port must be rented."""
        own = self._pinned(Address("0.0.0.0", Address.parse(self.listening).port))
        if self.announced is not None:
            own = self._pinned(announced_address(self.announced, self.listening))
        others = list(await self.others())
        asked, verdicts = random.sample(others, min(TRIED, len(others))), list[DialResult]()
        while asked and len(verdicts) < ASKED:
            some, asked = asked[:ASKED], asked[ASKED:]
            said = await asyncio.gather(*(verdict_of(self.transport, other, own) for other in some))
            verdicts += [verdict for verdict in said if verdict is not None]
        return decide_address(self.announced, self.assumed, verdicts)

    async def _rent_somewhere(self) -> bool:
        """Rent, and keep it until it is lost; False if nobody lends."""
        landlords = sorted(await self.others(), key=lambda landlord: landlord == self._lost_by)
        for landlord in landlords[:TRIED]:
            if await self._rent_of(landlord):
                self._lost_by = landlord
                await asyncio.sleep(random.uniform(0.0, SPREAD_S))
                return True
        return False

    async def _rent_of(self, landlord: str) -> bool:
        """Whether this one lent a port, which is lost by now."""
        settled = False
        try:
            async with rent(self.transport, landlord, self._local(), self.guests) as port:
                await self._check(port)
                await self._settle(PublicAddress(port.address, Basis.RENTED, True))
                settled = True
                while True:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(CHECK_EVERY_S):
                            await port.kept()
                    await self._check(port)
        except SwarmError as error:
            log.info("%s %s: %s", "lost the port rented of" if settled else "no port of", landlord, error)
        return settled

    async def _check(self, port: RentedPort) -> None:
        """Dial it as a stranger does at first: this node's own key must answer.  Raises Unreachable, Impostor."""
        address = Address.parse(self._pinned(Address.parse(port.address)))
        check_pin(address, await fetch_certificate(address, CHECK_S))

    async def _settle(self, place: PublicAddress) -> None:
        if place != self.place:
            self.place = place
            log.info("others find this node at %s (%s)", place.address, place.how)
            await self.settled(place)

    def _local(self) -> str:
        at = Address.parse(self.listening)
        return Address(ANY_HOSTS.get(at.host, at.host), at.port).bare

    def _pinned(self, address: Address) -> str:
        return str(Address(address.host, address.port, self.pin))


async def _sleep(seconds: float) -> None:
    """With jitter, so that nodes started together do not ask together for ever."""
    await asyncio.sleep(seconds * random.uniform(0.8, 1.2))
