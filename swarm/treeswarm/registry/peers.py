"""A registry that asks nodes for their records, so that a client needs a few addresses, and no DHT and no broker."""

import asyncio
import contextlib
import logging
import statistics
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import BadRequest, SwarmError, TransportError
from treeswarm.protocol.address import without_pin
from treeswarm.protocol.messages import NumericsClass, Records, Watch
from treeswarm.protocol.records import NodeRecord, SealedRecord
from treeswarm.protocol.spans import missing_blocks
from treeswarm.registry.book import BookRegistry, Source
from treeswarm.registry.clocks import CLOCK_SKEW_S, ClockSample, compare_clocks, explain_clock_kept
from treeswarm.registry.diagnosis import SearchReport, explain_no_nodes
from treeswarm.tasks import keep_running
from treeswarm.transport.seam import Stream, StreamKind, Transport

log = logging.getLogger(__name__)

# Number of nodes asked at a time: two of them may be dishonest or fail at once, and a third still reports.
SOURCES = 3
RETRY_S = 2.0
# Seconds to wait for the first answer at the start.
FIRST_ANSWER_S = 10.0
# Seconds that the other nodes of a static list have at least, where the first ones answer in no time.
LEAST_GRACE_S = 0.05


@dataclass(eq=False)
class _Source:
    """What is known of an address as a source of records."""

    task: "asyncio.Task[None] | None" = None
    """Task that asks the node at this address, or None if it was never asked."""
    stopped_at: float = 0.0
    """Time, by the event loop's clock, at which the node last did not answer or stopped reporting."""
    answered_or_failed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the node has answered or failed for the first time."""

    @property
    def active(self) -> bool:
        return self.task is not None and not self.task.done()


@dataclass(eq=False)
class PeersRegistry(BookRegistry):
    """Watches the records of nodes over the transport.

    With `discover`, each node reports every record it knows.  So a few addresses stand for the whole swarm, and when
    these nodes are gone, other known nodes are asked instead.  Without `discover`, each node reports only its own
    record: exactly `addresses` are the swarm.
    """

    transport: Transport = field(kw_only=True)
    addresses: tuple[str, ...] = field(kw_only=True)
    """Addresses that the user gave."""
    discover: bool = True
    dial_addresses: dict[str, str] = field(default_factory=dict)
    """Address to dial for each node id, without `discover`: the address as typed, with the pin of the record."""
    unanswered: dict[str, SwarmError] = field(default_factory=dict)
    """Errors of the addresses that did not answer when last asked."""
    source_clocks: dict[str, ClockSample] = field(default_factory=dict)
    """What the nodes asked say of their clocks, by address."""
    _started: bool = False
    """Whether the first answers have come: a warning counts them together."""
    _warned_of_s: float = 0.0
    """Seconds by which this machine's clock was ahead at the last look."""
    _sources: dict[str, _Source] = field(default_factory=dict)
    _keeper: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.addresses:
            raise BadRequest("no node is named: give --peers HOST:PORT,HOST:PORT")

    def begin(self) -> None:
        """Begin to ask, and go on until the registry is closed, whether any address answers or not."""
        self._keeper = asyncio.create_task(keep_running("asking nodes for records", self._keep_asking))

    async def start(self) -> None:
        """Begin to ask all addresses at once, and wait for the records that a client needs to begin.

        Addresses that do not answer cost no time where others do.  Raises the error that explains why no node answers.
        A registry that could not be started, or whose start was cancelled, is closed.
        """
        self.begin()
        try:
            await self._wait_for_first_records()
            if not self.book.alive():
                raise explain_no_nodes(self.report())
        except BaseException:
            await self.close()
            raise
        self._started = True
        self._warn_of_clock()

    async def _wait_for_first_records(self) -> None:
        waiting = [asyncio.create_task(self._source(address).answered_or_failed.wait()) for address in self.addresses]
        began = asyncio.get_running_loop().time()
        try:
            while (pending := [task for task in waiting if not task.done()]) and not self._suffices():
                done, _ = await asyncio.wait(pending, timeout=FIRST_ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
            if pending and not self.discover:  # as long again: the other nodes of a list are about as far away
                await asyncio.wait(pending, timeout=max(LEAST_GRACE_S, asyncio.get_running_loop().time() - began))
        finally:
            for task in waiting:
                task.cancel()

    def _suffices(self) -> bool:
        """Return whether the records known suffice to begin.

        With `discover`, one answer contains all records.  In a static list every node reports its own: the nodes that
        have answered suffice if every numerics class of theirs has all blocks.
        """
        records = [sealed.record for sealed in self.book.alive()]
        classes: dict[tuple[str, NumericsClass], list[NodeRecord]] = {}
        for record in records:
            classes.setdefault((record.model, record.numerics), []).append(record)
        return bool(records) and (
            self.discover
            or all(not missing_blocks([r.span for r in nodes], nodes[0].blocks) for nodes in classes.values())
        )

    def report(self) -> SearchReport:
        by_peer = {sample.peer: sample for sample in [*self.clock_samples(), *self.source_clocks.values()]}
        rejections, samples = tuple(self.book.rejections.values()), tuple(by_peer.values())
        return SearchReport(self.addresses, dict(self.unanswered), rejections, compare_clocks(samples), samples)

    async def announce(self, sealed: SealedRecord) -> None:
        raise BadRequest(
            "a list of addresses takes no records: a node announces itself in a DHT, at an MQTT broker or nowhere"
        )

    async def withdraw(self, sealed: SealedRecord) -> None:
        await self.announce(sealed)

    async def close(self) -> None:
        tasks = [task for task in (self._keeper, *(source.task for source in self._sources.values())) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _source(self, address: str) -> _Source:
        return self._sources.setdefault(address, _Source())

    async def _keep_asking(self) -> None:
        while True:
            self._drop_unnamed()
            for address in self._addresses_to_ask():
                source = self._source(address)
                if not source.active:
                    source.task = asyncio.create_task(self._ask(address))
            await asyncio.sleep(RETRY_S)

    def _drop_unnamed(self) -> None:
        """Drop the addresses that no record names any more: a dishonest node may have named thousands."""
        kept = {*self.addresses, *(sealed.record.dial for sealed in self.book.alive())}
        for address in [a for a, source in self._sources.items() if a not in kept and not source.active]:
            del self._sources[address]
            self.source_clocks.pop(address, None)
            self.unanswered.pop(address, None)

    def _addresses_to_ask(self) -> list[str]:
        if not self.discover:
            return list(self.addresses)
        active = [address for address, source in self._sources.items() if source.active]
        known = sorted((sealed.record for sealed in self.book.alive()), key=lambda record: not record.reachable)
        others = (*self.addresses, *(record.dial for record in known))
        # Addresses that stopped answering come last, the latest at the very end: so a list of dead addresses is not
        # tried again and again while others wait.
        waiting = sorted(
            dict.fromkeys(address for address in others if address not in active),
            key=lambda address: self._sources[address].stopped_at if address in self._sources else 0.0,
        )
        count = SOURCES if self.book.alive() else max(SOURCES, len(self.addresses))
        return [*active, *waiting[: max(0, count - len(active))]]

    async def _ask(self, address: str) -> None:
        """Receive records from one node until its stream ends."""
        try:
            stream = await self.transport.connect(address, StreamKind.CONTROL)
            try:
                await self._listen(address, stream)
            finally:
                with contextlib.suppress(SwarmError):
                    await stream.end()
        except SwarmError as error:
            self.unanswered[address] = error
            log.info("no records from %s: %s", address, error)
        finally:
            source = self._source(address)
            source.stopped_at = asyncio.get_running_loop().time()
            source.answered_or_failed.set()

    async def _listen(self, address: str, stream: Stream) -> None:
        await stream.send(Watch(PROTOCOL_VERSION, self.discover, self._microseconds()))
        while (message := await stream.receive()) is not None:
            if not isinstance(message, Records):
                raise TransportError(f"{address} answered a watch request with a {type(message).__name__}")
            self._compare_clock(address, message)
            for news in await self.add_records(message.sealed, Source(address, self._clock_to_judge_by(address))):
                self._note_return(news.record)
                if not self.discover:
                    pin = f"#{news.record.pin}" if news.record.pin else ""
                    self.dial_addresses[news.record.node] = without_pin(address) + pin
            self.unanswered.pop(address, None)
            self._source(address).answered_or_failed.set()

    def _note_return(self, record: NodeRecord) -> None:
        """Learn from a record that its node lives again, although it is not asked: others took its place as a source.

        A record that the node signed before it fell silent says nothing.
        """
        age_s = self.clock() - record.generation / 1e6
        signed_at = asyncio.get_running_loop().time() - age_s
        for address in [a for a in self.unanswered if without_pin(a) == record.address]:
            if signed_at > self._source(address).stopped_at:
                del self.unanswered[address]

    # ---- clocks --------------------------------------------------------------------------------------------------

    def _microseconds(self) -> int:
        return int(self.clock() * 1e6)

    def _compare_clock(self, address: str, message: Records) -> None:
        """Learn the clock of a node from its message."""
        if not message.clock:
            return  # a node of an earlier release
        bare = without_pin(address)
        self.source_clocks[address] = ClockSample(bare, (message.clock - self._microseconds()) / 1e6)
        if self._started:
            self._warn_of_clock()

    def _warn_of_clock(self) -> None:
        """Warn of this machine's clock, once for each difference."""
        difference = compare_clocks(self.source_clocks.values())
        ahead_s = difference.ahead_s if difference else 0.0
        if difference and abs(ahead_s - self._warned_of_s) > CLOCK_SKEW_S:
            log.warning("%s", explain_clock_kept(difference))
        self._warned_of_s = ahead_s

    def _clock_to_judge_by(self, address: str) -> float:
        """Return by how many seconds the clock that judges a node's records is ahead of this machine's.

        An address that the user named is judged by its own clock, so that a wrong clock here keeps nobody out: the node
        lives, and machines at the addresses in its records must show the keys in them.  A node that was only
        heard of could pass on outdated records of others with a clock to suit them.  It is judged by the named ones.
        """
        named = [sample.ahead_s for key, sample in self.source_clocks.items() if key in self.addresses]
        own = self.source_clocks.get(address)
        ahead_s = own.ahead_s if own and address in self.addresses else statistics.median(named) if named else 0.0
        return ahead_s if abs(ahead_s) > CLOCK_SKEW_S / 2 else 0.0
