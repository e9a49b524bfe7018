"""What a generation works with and nobody else uses meanwhile: a drafter, and a planner of its trees."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from treeswarm_client.drafters.seam import Copyable, Drafter
from treeswarm_client.planner.policy import PlannerMemory

# Each drafter has a KV cache of its own; more at once than that would wait for the draft's device anyway.
MOST_SEATS = 8


@dataclass(frozen=True, eq=False)
class PooledDrafter:
    """Both outlive generations: what they have learned serves the next one."""

    drafter: Drafter
    memory: PlannerMemory = field(default_factory=PlannerMemory)


class DrafterPool:
    """One with the `first` drafter, and others with copies of it; generations take turns where it cannot be copied."""

    def __init__(self, first: Drafter, most: int = MOST_SEATS) -> None:
        self._first = first
        self._free = [PooledDrafter(first)]
        self._turns = asyncio.Semaphore(most if isinstance(first, Copyable) else 1)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[PooledDrafter]:
        """The seat last used of those that are free; waits for one where there are too many generations."""
        async with self._turns:
            seat = self._free.pop() if self._free else self._another()
            try:
                yield seat
            finally:
                self._free.append(seat)

    def _another(self) -> PooledDrafter:
        assert isinstance(self._first, Copyable)
        return PooledDrafter(self._first.copy_for_new_generation())
