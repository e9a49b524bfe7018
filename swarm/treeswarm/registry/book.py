"""Decides which records are believed: signed by their node, of this model, in date, and newer than the known one."""

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

# Number of seconds by which the clocks of two honest machines may differ.
CLOCK_SKEW_S = 60.0
# Number of reports of lost nodes that may wait.
MAX_HINTS = 256
# So many records take tens of megabytes.  A larger swarm for one model needs more than one list anyway.
MAX_NODES = 50_000


@dataclass(eq=False)
class RecordBook:
    """The newest believed record of every node."""

    model: str | None = None
    """Config digest of the model whose records are believed, or None for every model."""
    clock: Callable[[], float] = time.time
    """Returns the seconds since 1970."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of records that were not believed, by reason."""
    _records: dict[str, SealedRecord] = field(default_factory=dict)

    def add(self, sealed: bytes) -> SealedRecord | None:
        """Add a record.  Return it if it is new, else None.  A record that is not believed is counted in `rejected`."""
        try:
            read = unseal(sealed)
            earlier = self._records.get(read.record.node)
            rejection = self._rejection(read.record, earlier)
        except Malformed as error:
            read, earlier, rejection = None, None, rejection_reason(error, sealed)
        if read is None or rejection:
            if earlier is None or earlier.sealed != sealed:  # Receiving the same record twice is normal.
                self.rejected[rejection] += 1
            return None
        self._records[read.record.node] = read
        return read

    def alive(self) -> Snapshot:
        """Return the unexpired records that are not in state GONE, sorted by node id."""
        return tuple(sealed for sealed in self.unexpired() if sealed.record.state is not NodeState.GONE)

    def unexpired(self) -> Snapshot:
        """Return the unexpired records, sorted by node id, those in state GONE included.

        A GONE record must be passed on until the records that it withdraws have expired.
        """
        now = self.clock()
        self._records = {node: sealed for node, sealed in self._records.items() if sealed.record.expires > now}
        return tuple(sealed for _, sealed in sorted(self._records.items()))

    def get(self, node: str) -> SealedRecord | None:
        """Return the newest believed record of a node, in state GONE or not, or None."""
        return self._records.get(node)

    def _rejection(self, record: NodeRecord, earlier: SealedRecord | None) -> str:
        """Return the reason not to believe a record, or an empty string."""
        now = self.clock()
        reasons = {
            "other-model": self.model is not None and record.model != self.model,
            "expired": not now - CLOCK_SKEW_S < record.expires < now + MAX_LIFETIME_S + CLOCK_SKEW_S,
            "from-the-future": record.generation > (now + CLOCK_SKEW_S) * 1e6,
            "stale": earlier is not None and record.generation <= earlier.record.generation,
            "too-many": earlier is None and len(self._records) >= MAX_NODES,
        }
        return next((reason for reason, applies in reasons.items() if applies), "")


def rejection_reason(error: Malformed, sealed: bytes) -> str:
    """Return the reason that `RecordBook.rejected` counts bytes under that are no valid record."""
    if isinstance(error, Forged):
        return "forged"
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

    async def add_records(self, many: Iterable[bytes]) -> list[SealedRecord]:
        """Add sealed records to the book, and wake the watchers if any of them is new.  Return the new ones."""
        news = [read for sealed in many if (read := self.book.add(sealed)) is not None]
        if news:
            async with self._changed:
                self._version += 1
                self._changed.notify_all()
        return news
