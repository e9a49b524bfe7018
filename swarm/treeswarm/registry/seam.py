"""The registry seam: who is out there.

Adapters: `memory.py` and `static.py`; one conformance suite runs against all.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class NodeRecord:
    """What a registry knows of one node; the node itself says the rest."""

    address: str


class Registry(Protocol):
    """Four verbs.  All may raise TransportError where a registry is reached over a network."""

    async def announce(self, record: NodeRecord) -> None:
        """Make `record` known, in place of an older one of the same address."""
        ...

    async def withdraw(self, address: str) -> None:
        """Forget the node at `address`; nothing happens if it was not known."""
        ...

    async def snapshot(self) -> tuple[NodeRecord, ...]:
        """All that is known now, in the order announced."""
        ...

    def watch(self) -> AsyncIterator[tuple[NodeRecord, ...]]:
        """Snapshots: the present one at once, then one after every change."""
        ...
