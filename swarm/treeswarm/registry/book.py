"""Which records are believed: signed by their node, of this model, in date, and newer than what was known."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from treeswarm.errors import Malformed
from treeswarm.protocol.messages import MAX_RECORD_BYTES
from treeswarm.protocol.records import MAX_LIFETIME_S, NodeRecord, NodeState, SealedRecord
from treeswarm.registry.seam import Snapshot
from treeswarm.wire.sealing import Forged, unseal

# How far two honest machines' clocks may differ.
CLOCK_SKEW_S = 60.0
# Tens of megabytes; a swarm for one model larger than this needs more than one list anyway.
MAX_NODES = 50_000


@dataclass(eq=False)
class RecordBook:
    """The newest believed record of every node.  `model` is the config digest it is about; None: any."""

    model: str | None = None
    clock: Callable[[], float] = time.time
    rejected: Counter[str] = field(default_factory=Counter)
    _records: dict[str, SealedRecord] = field(default_factory=dict)

    def add(self, sealed: bytes) -> SealedRecord | None:
        """The record if it is news, else None.  What is not believed is counted, by reason, in `rejected`."""
        try:
            read = unseal(sealed)
            known = self._records.get(read.record.node)
            doubt = self._doubt(read.record, known)
        except Malformed as error:
            read, known, doubt = None, None, rejection_reason(error, sealed)
        if read is None or doubt:
            if known is None or known.sealed != sealed:  # hearing the same again is no attack
                self.rejected[doubt] += 1
            return None
        self._records[read.record.node] = read
        return read

    def alive(self) -> Snapshot:
        """In date, and not gone; in the order of node ids."""
        return tuple(known for known in self.unexpired() if known.record.state is not NodeState.GONE)

    def unexpired(self) -> Snapshot:
        """Those of nodes that are gone too: a farewell must be passed on until what it revokes has expired."""
        now = self.clock()
        self._records = {node: known for node, known in self._records.items() if known.record.expires > now}
        return tuple(known for _, known in sorted(self._records.items()))

    def of(self, node: str) -> SealedRecord | None:
        """The newest believed record of a node, gone or not."""
        return self._records.get(node)

    def _doubt(self, record: NodeRecord, known: SealedRecord | None) -> str:
        """Why not to believe a record, or nothing."""
        now = self.clock()
        doubts = {
            "other-model": self.model is not None and record.model != self.model,
            "expired": not now - CLOCK_SKEW_S < record.expires < now + MAX_LIFETIME_S + CLOCK_SKEW_S,
            "from-the-future": record.generation > (now + CLOCK_SKEW_S) * 1e6,
            "stale": known is not None and record.generation <= known.record.generation,
            "too-many": known is None and len(self._records) >= MAX_NODES,
        }
        return next((doubt for doubt, holds in doubts.items() if holds), "")


def rejection_reason(error: Malformed, sealed: bytes) -> str:
    """The word it is counted under."""
    if isinstance(error, Forged):
        return "forged"
    return "oversized" if len(sealed) > MAX_RECORD_BYTES else "malformed"


@dataclass(eq=False)
class BookRegistry:
    """What adapters share: a book, and watchers of it."""

    model: str | None = None
    clock: Callable[[], float] = time.time
    book: RecordBook = field(init=False)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _version: int = 0

    def __post_init__(self) -> None:
        self.book = RecordBook(self.model, self.clock)

    @property
    def rejected(self) -> "Counter[str]":
        return self.book.rejected

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
        """Nothing to let go of."""

    async def add_records(self, many: Iterable[bytes]) -> list[SealedRecord]:
        """Take what came in, and wake the watchers if any of it was news; returns the news."""
        news = [read for sealed in many if (read := self.book.add(sealed)) is not None]
        if news:
            async with self._changed:
                self._version += 1
                self._changed.notify_all()
        return news
