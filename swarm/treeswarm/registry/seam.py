"""The registry interface: the records of the nodes that serve a model.

A registry holds signed bytes that anyone may store and pass on; `book.py` decides which of them are believed.
Implementations: `memory.py`, `peers.py` (nodes pass records on to clients), `dht.py` and `mqtt.py`.  One conformance
suite runs against all of them.
"""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from treeswarm.protocol.records import SealedRecord
from treeswarm.registry.clocks import ClockSample
from treeswarm.registry.diagnosis import SearchReport

Snapshot = tuple[SealedRecord, ...]
"""Believed records of one moment, at most one per node."""


class Registry(Protocol):
    """Records of the nodes that serve one model.

    The methods raise TransportError where the registry cannot be reached.  Records received before stay known until
    they expire.
    """

    @property
    def rejected(self) -> "Counter[str]":
        """Number of records that were not believed, by reason.

        Reasons are forged, stale, expired, oversized, malformed, other-model and others of the implementations.
        """
        ...

    def report(self) -> SearchReport:
        """Return what is known for an explanation of why there is no node to use; see `diagnosis`."""
        ...

    async def announce(self, sealed: SealedRecord) -> None:
        """Publish a record.  It replaces older records of the same node."""
        ...

    async def withdraw(self, sealed: SealedRecord) -> None:
        """Publish that the node is gone: `sealed` is its last record, in state GONE."""
        ...

    async def snapshot(self) -> Snapshot:
        """Return the records believed now: at most one per node, none expired and none in state GONE."""
        ...

    def watch(self) -> AsyncIterator[Snapshot]:
        """Yield the present snapshot at once, then one after each change.  Several changes may come as one."""
        ...

    async def close(self) -> None:
        """Close connections and processes.  Announced records stay published until they expire."""
        ...


@runtime_checkable
class AsksClocks(Protocol):
    """A registry whose peers can be asked for their time."""

    async def ask_clocks(self) -> Sequence[ClockSample]:
        """Return what some peers say of their clocks."""
        ...
