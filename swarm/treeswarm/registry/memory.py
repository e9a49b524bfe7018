"""A registry within one process."""

from dataclasses import dataclass

from treeswarm.protocol.records import SealedRecord
from treeswarm.registry.book import BookRegistry


@dataclass(eq=False)
class MemoryRegistry(BookRegistry):
    """Registry for tests, and for programs that run nodes and clients in one process."""

    async def announce(self, sealed: SealedRecord) -> None:
        await self.add_records([sealed.sealed])

    async def withdraw(self, sealed: SealedRecord) -> None:
        await self.add_records([sealed.sealed])
