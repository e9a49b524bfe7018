"""Decides which records are believed: signed by their node, of this model, in date, and newer than the known one."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from treeswarm.errors import Malformed
from treeswarm.programs.units import format_rough_duration
from treeswarm.protocol.messages import MAX_RECORD_BYTES
from treeswarm.protocol.records import MAX_LIFETIME_S, NodeRecord, NodeState, SealedRecord
from treeswarm.registry.clocks import (
    CLOCK_SKEW_S,
    ClockSample,
    compare_clocks,
    steady_s,
)
from treeswarm.registry.diagnosis import Rejection, SearchReport
from treeswarm.registry.seam import Snapshot
from treeswarm.wire.sealing import Forged, OtherVersion, unseal

# Number of reports of lost nodes that may wait.
MAX_HINTS = 256
# So many records take tens of megabytes.  A larger swarm for one model needs more than one list anyway.
MAX_NODES = 50_000
# Rejections and clocks are kept for messages only.  So many nodes are evidence enough, and an attacker fills no memory.
MAX_KEPT = 256


@dataclass(frozen=True)
class Source:
    """The sender of records."""

    address: str = ""
    """Address of the sender, or empty for a registry that mixes the records of many."""
    clock_ahead_s: float = 0.0
    """Seconds by which the clock that these records are judged by is ahead of this machine's."""


ANY_SOURCE = Source()


@dataclass(eq=False)
class RecordBook:
    """The newest believed record of every node."""

    model: str | None = None
    """Config digest of the model whose records are believed, or None for every model."""
    clock: Callable[[], float] = time.time
    """Returns the seconds since 1970, by which records are judged when they come."""
    timer: Callable[[], float] | None = None
    """Returns seconds by which records expire; by default those of `steady_s`, or of `clock` where one is given."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of records that were not believed, by reason."""
    rejections: dict[str, Rejection] = field(default_factory=dict)
    """The last record that was not believed, by node id, or by sender where the record cannot be read."""
    clocks: dict[str, ClockSample] = field(default_factory=dict)
    """What the records say of their nodes' clocks, by node id."""
    _signed: dict[str, int] = field(default_factory=dict)
    """Generation of the newest record received of each node, believed or not."""
    _records: dict[str, SealedRecord] = field(default_factory=dict)
    _expiries: dict[str, float] = field(default_factory=dict)
    """Time of the timer at which each record expires."""

    def add(self, sealed: bytes, source: Source = ANY_SOURCE) -> SealedRecord | None:
        """Add a record.  Return it if it is new, else None.

        A record that is not believed is counted in `rejected`, and described in `rejections`.
        """
        try:
            read = unseal(sealed)
        except Malformed as error:
            reason = rejection_reason(error, sealed)
            self._reject(source.address, Rejection(reason, source.address, detail=str(error)))
            return None
        record, earlier = read.record, self._records.get(read.record.node)
        self._compare_clock(record)
        if reason := self._rejection(record, earlier, source):
            if earlier is None or earlier.sealed != sealed:  # Receiving the same record twice is normal.
                detail = self._describe(record, reason)
                self._reject(record.node, Rejection(reason, source.address, record.address, detail))
            return None
        self.rejections.pop(record.node, None)
        self._records[record.node] = read
        self._expiries[record.node] = self._now() + record.expires - self.clock() - source.clock_ahead_s
        return read

    def forget(self, node: str) -> None:
        """Forget a node's record: the next one may be older, after this machine's clock was set back."""
        self._records.pop(node, None)

    def alive(self) -> Snapshot:
        """Return the unexpired records that are not in state GONE, sorted by node id."""
        return tuple(sealed for sealed in self.unexpired() if sealed.record.state is not NodeState.GONE)

    def unexpired(self) -> Snapshot:
        """Return the unexpired records, sorted by node id, those in state GONE included.

        A GONE record must be passed on until the records that it withdraws have expired.
        """
        now = self._now()
        self._records = {node: sealed for node, sealed in self._records.items() if self._expiries[node] > now}
        self._expiries = {node: self._expiries[node] for node in self._records}
        return tuple(sealed for _, sealed in sorted(self._records.items()))

    def get(self, node: str) -> SealedRecord | None:
        """Return the newest believed record of a node, in state GONE or not, or None."""
        return self._records.get(node)

    def _now(self) -> float:
        """Return the time by which records expire.

        A clock that is set while the program runs must neither end all records at once nor keep them for ever.
        """
        if self.timer is not None:
            return self.timer()
        return steady_s() if self.clock is time.time else self.clock()

    def reject(self, reason: str, address: str = "") -> None:
        """Count a record that a registry did not believe for a reason of its own."""
        self._reject(address or reason, Rejection(reason, address=address))

    def _reject(self, key: str, rejection: Rejection) -> None:
        self.rejected[rejection.reason] += 1
        put_newest(self.rejections, key, rejection)

    def _rejection(self, record: NodeRecord, earlier: SealedRecord | None, source: Source) -> str:
        """Return the reason not to believe a record, or an empty string."""
        now = self.clock() + source.clock_ahead_s
        is_future = record.generation > (now + CLOCK_SKEW_S) * 1e6
        reasons = {
            "other-model": self.model is not None and record.model != self.model,
            "from-the-future": is_future or record.expires >= now + MAX_LIFETIME_S + CLOCK_SKEW_S,
            "expired": record.expires <= now - CLOCK_SKEW_S,
            "stale": earlier is not None and record.generation <= earlier.record.generation,
            "too-many": earlier is None and len(self._records) >= MAX_NODES,
        }
        return next((reason for reason, applies in reasons.items() if applies), "")

    def _describe(self, record: NodeRecord, reason: str) -> str:
        if reason == "other-model":
            return record.name
        age_s = self.clock() - record.generation / 1e6
        return f"signed {format_rough_duration(abs(age_s))} {'ago' if age_s > 0 else 'ahead of this clock'}"

    def _compare_clock(self, record: NodeRecord) -> None:
        known = self._signed.get(record.node)
        if known is None or record.generation != known:
            ahead_s = record.generation / 1e6 - self.clock()
            # Only a record that came after another one of its node was surely signed just now.
            sample = ClockSample(record.address, ahead_s, is_fresh=known is not None and record.generation > known)
            put_newest(self._signed, record.node, record.generation)
            put_newest(self.clocks, record.node, sample)


Kept = TypeVar("Kept")


def put_newest(kept: dict[str, Kept], key: str, value: Kept) -> None:
    """Put a value at the end of a dictionary, and drop the oldest ones beyond `MAX_KEPT`."""
    kept.pop(key, None)
    kept[key] = value
    while len(kept) > MAX_KEPT:
        del kept[next(iter(kept))]


def rejection_reason(error: Malformed, sealed: bytes) -> str:
    """Return the reason that `RecordBook.rejected` counts bytes under that are no valid record."""
    if isinstance(error, Forged):
        return "forged"
    if isinstance(error, OtherVersion):
        return "other-version"
    return "oversized" if len(sealed) > MAX_RECORD_BYTES else "malformed"


@dataclass(eq=False)
class BookRegistry:
    """Base of the registries: a record book, and watchers of its changes."""

    model: str | None = None
    """Config digest of the model, or None for every model."""
    clock: Callable[[], float] = time.time
    book: RecordBook = field(init=False)
    hints: asyncio.Queue[str] = field(default_factory=lambda: asyncio.Queue(MAX_HINTS))
    """Ids of known nodes that are reported as lost.

    Anyone can send these reports, so they are a reason to ping the node and no more.
    """
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _version: int = 0

    def __post_init__(self) -> None:
        self.book = RecordBook(self.model, self.clock)

    @property
    def lag_s(self) -> float:
        """Seconds within which an announced record reaches all readers, as a rule."""
        return 1.0

    def hint(self, node: str) -> None:
        """Queue a hint that a known node may be lost, if the queue has room: anyone may send these."""
        if self.book.get(node) is not None and not self.hints.full():
            self.hints.put_nowait(node)

    @property
    def rejected(self) -> "Counter[str]":
        return self.book.rejected

    def clock_samples(self, but: str = "") -> list[ClockSample]:
        """Return what is known of the clocks of nodes, except of the node with the id `but`."""
        return [sample for node, sample in self.book.clocks.items() if node != but]

    def report(self) -> SearchReport:
        """Return what is known for an explanation of why there is no node to use."""
        rejections, samples = tuple(self.book.rejections.values()), self.clock_samples()
        return SearchReport(rejections=rejections, clock=compare_clocks(samples), samples=samples)

    async def snapshot(self) -> Snapshot:
        return self.book.alive()

    async def watch(self) -> AsyncIterator[Snapshot]:
        seen = -1
        while True:
            async with self._changed:
                while self._version <= seen:
                    await self._changed.wait()
                seen = self._version
            yield await self.snapshot()

    async def close(self) -> None:
        """Do nothing: this base has no connections."""

    async def replace_own(self, sealed: SealedRecord) -> None:
        """Put this machine's own record in place of the earlier one, and wake the watchers."""
        self.book.forget(sealed.record.node)
        await self.add_records([sealed.sealed])

    async def add_records(self, many: Iterable[bytes], source: Source = ANY_SOURCE) -> list[SealedRecord]:
        """Add sealed records to the book, and wake the watchers if any of them is new.  Return the new ones."""
        news = [read for sealed in many if (read := self.book.add(sealed, source)) is not None]
        if news:
            async with self._changed:
                self._version += 1
                self._changed.notify_all()
        return news
