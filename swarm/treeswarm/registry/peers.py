"""What nodes tell whoever asks: a client needs a few addresses, and neither a DHT nor a broker."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import BadRequest, SwarmError, TransportError, Unreachable
from treeswarm.protocol.messages import Records, Watch
from treeswarm.protocol.records import SealedRecord
from treeswarm.registry.book import BookRegistry
from treeswarm.transport.seam import Stream, StreamKind, Transport

log = logging.getLogger(__name__)

# Two may lie or die at once, and a third still tells.
SOURCES = 3
RETRY_S = 2.0
FIRST_WORD_S = 10.0


@dataclass(eq=False)
class PeersRegistry(BookRegistry):
    """Watches nodes over the transport.

    With `discover` each node tells all it knows, so a few addresses stand for the swarm, and when those are gone, nodes
    heard of take their place.  Without, each speaks for itself: exactly `addresses` are the swarm.
    """

    transport: Transport = field(kw_only=True)
    addresses: tuple[str, ...] = field(kw_only=True)
    discover: bool = True
    dial_addresses: dict[str, str] = field(default_factory=dict)
    """Where each node speaks for itself, by id: the address as typed, with the pin of its record."""
    unanswered: dict[str, SwarmError] = field(default_factory=dict)
    """Addresses that did not answer when last asked, and why."""
    _stopped_at: dict[str, float] = field(default_factory=dict)
    """When each address last did not answer, or stopped talking."""
    _asked: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _first: dict[str, asyncio.Event] = field(default_factory=dict)
    _keeper: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.addresses:
            raise BadRequest("no node is named: give --peers HOST:PORT,HOST:PORT")

    async def start(self) -> None:
        """Ask, and wait for the first words.  Raises why, if none of the addresses answers."""
        self._keeper = asyncio.create_task(self._keep_asking())
        waiting = [asyncio.create_task(self._heard_of(address)) for address in self.addresses]
        # Everyone's word in a static list; anyone's where each tells of all.
        await asyncio.wait(
            waiting,
            timeout=FIRST_WORD_S,
            return_when=asyncio.FIRST_COMPLETED if self.discover else asyncio.ALL_COMPLETED,
        )
        while self.discover and not self.book.alive() and not all(task.done() for task in waiting):
            done, _ = await asyncio.wait([t for t in waiting if not t.done()], timeout=FIRST_WORD_S)
            if not done:
                break
        for task in waiting:
            task.cancel()
        if not self.book.alive():
            await self.close()
            errors = list(self.unanswered.values())
            raise errors[0] if errors else Unreachable(f"nobody answers at {', '.join(self.addresses)}")

    async def announce(self, sealed: SealedRecord) -> None:
        raise BadRequest("a node announces itself in a DHT, at a broker or nowhere; clients' lists take no records")

    async def withdraw(self, sealed: SealedRecord) -> None:
        await self.announce(sealed)

    async def close(self) -> None:
        tasks = [task for task in (self._keeper, *self._asked.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _heard_of(self, address: str) -> None:
        await self._first.setdefault(address, asyncio.Event()).wait()

    async def _keep_asking(self) -> None:
        while True:
            self._forget_those_gone()
            for address in self._wanted():
                if address not in self._asked or self._asked[address].done():
                    self._asked[address] = asyncio.create_task(self._ask(address))
            await asyncio.sleep(RETRY_S)

    def _forget_those_gone(self) -> None:
        """Addresses that no record names any more; a stranger may have named thousands."""
        kept = {*self.addresses, *(sealed.record.dial for sealed in self.book.alive())}
        for address in [a for a, task in self._asked.items() if a not in kept and task.done()]:
            for known in (self._asked, self._first, self._stopped_at, self.unanswered):
                known.pop(address, None)

    def _wanted(self) -> list[str]:
        if not self.discover:
            return list(self.addresses)
        speaking = [address for address, task in self._asked.items() if not task.done()]
        heard_of = sorted((s.record for s in self.book.alive()), key=lambda record: not record.reachable)
        others = (*self.addresses, *(record.dial for record in heard_of))
        # Those that stopped come last, the latest at the very end: a list of dead addresses is not tried for ever.
        waiting = sorted(
            dict.fromkeys(address for address in others if address not in speaking),
            key=lambda address: self._stopped_at.get(address, 0.0),
        )
        wanted = SOURCES if self.book.alive() else max(SOURCES, len(self.addresses))
        return [*speaking, *waiting[: max(0, wanted - len(speaking))]]

    async def _ask(self, address: str) -> None:
        """Listen to one node until it stops talking."""
        try:
            stream = await self.transport.connect(address, StreamKind.CONTROL)
            try:
                await self._listen(address, stream)
            finally:
                with contextlib.suppress(SwarmError):
                    await stream.end()
        except SwarmError as error:
            self.unanswered[address] = error
            log.info("%s tells nothing: %s", address, error)
        finally:
            self._stopped_at[address] = asyncio.get_running_loop().time()
            self._first.setdefault(address, asyncio.Event()).set()

    async def _listen(self, address: str, stream: Stream) -> None:
        await stream.send(Watch(PROTOCOL_VERSION, self.discover))
        while (message := await stream.receive()) is not None:
            if not isinstance(message, Records):
                raise TransportError(f"{address} answered a watch with a {type(message).__name__}")
            for news in await self.add_records(message.sealed):
                if not self.discover:
                    pin = f"#{news.record.pin}" if news.record.pin else ""
                    self.dial_addresses[news.record.node] = address.partition("#")[0] + pin
            self.unanswered.pop(address, None)
            self._first.setdefault(address, asyncio.Event()).set()
