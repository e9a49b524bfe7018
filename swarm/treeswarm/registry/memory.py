"""A registry within one process."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from treeswarm.registry.seam import NodeRecord


@dataclass(eq=False)
class MemoryRegistry:
    """For tests and for programs that hold node and client at once."""

    _records: dict[str, NodeRecord] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _version: int = 0

    async def announce(self, record: NodeRecord) -> None:
        self._records[record.address] = record
        await self._notify()

    async def withdraw(self, address: str) -> None:
        if self._records.pop(address, None) is not None:
            await self._notify()

    async def snapshot(self) -> tuple[NodeRecord, ...]:
        return tuple(self._records.values())

    async def watch(self) -> AsyncIterator[tuple[NodeRecord, ...]]:
        seen = -1
        while True:
            async with self._changed:
                while self._version <= seen:
                    await self._changed.wait()
                seen = self._version
            yield await self.snapshot()

    async def _notify(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()
