"""The registry seam: who is out there.

Everything in a registry is signed bytes that anyone may store and pass on; `book.py` decides what of it is believed.
Adapters: `memory.py`, `peers.py` (what nodes tell clients), `dht.py`, `mqtt.py`; one conformance suite runs against
all.
"""

from collections import Counter
from collections.abc import AsyncIterator
from typing import Protocol

from treeswarm.protocol.records import SealedRecord

Snapshot = tuple[SealedRecord, ...]


class Registry(Protocol):
    """Records of the nodes that serve one model.  Verbs raise TransportError where the registry cannot be reached; what
    was known stays known until it expires."""

    @property
    def rejected(self) -> "Counter[str]":
        """Records that were not believed, by reason: forged, stale, expired, oversized, malformed, other-model."""
        ...

    async def announce(self, sealed: SealedRecord) -> None:
        """Make it known, in place of older ones of the same node."""
        ...

    async def withdraw(self, sealed: SealedRecord) -> None:
        """Make known that the node is gone: `sealed` is its last record, in state GONE."""
        ...

    async def snapshot(self) -> Snapshot:
        """All believed and alive now; at most one a node, none in state GONE."""
        ...

    def watch(self) -> AsyncIterator[Snapshot]:
        """Snapshots: the present one at once, then one after changes (several may come as one)."""
        ...

    async def close(self) -> None:
        """Let go of connections and processes.  Announced records stay until they expire."""
        ...
