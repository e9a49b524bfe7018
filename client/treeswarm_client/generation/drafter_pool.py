"""The pool from which each generation borrows a drafter, and the planner memory that goes with it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from treeswarm_client.drafters.seam import CopyableDrafter, Drafter
from treeswarm_client.planner.policy import PlannerMemory

# Number of generations that draft at once.  Each drafter has a KV cache of its own, and more generations would wait for
# the draft's device anyway.
MOST_GENERATIONS = 8


@dataclass(frozen=True, eq=False)
class PooledDrafter:
    """A drafter and a planner memory, used by one generation at a time.

    Both outlive generations: what they have learned serves the next one.
    """

    drafter: Drafter
    memory: PlannerMemory = field(default_factory=PlannerMemory)


class DrafterPool:
    """Lends the `first` drafter or copies of it, `most` at once; a drafter that cannot be copied is lent in turns."""

    def __init__(self, first: Drafter, most: int = MOST_GENERATIONS) -> None:
        self._first = first
        self._free = [PooledDrafter(first)]
        self._turns = asyncio.Semaphore(most if isinstance(first, CopyableDrafter) else 1)

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[PooledDrafter]:
        """Lend the free drafter that was used last, or a new copy; wait while too many generations run."""
        async with self._turns:
            pooled = self._free.pop() if self._free else self._copy()
            try:
                yield pooled
            finally:
                self._free.append(pooled)

    def _copy(self) -> PooledDrafter:
        assert isinstance(self._first, CopyableDrafter)
        return PooledDrafter(self._first.copy_for_new_generation())
