"""A drafter for each generation under way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol, Self, runtime_checkable

from treeswarm_client.drafters.seam import Drafter

# Each has a KV cache of its own; more at once than that would wait for the draft's device anyway.
MOST_COPIES = 8


@runtime_checkable
class Copyable(Protocol):
    """A drafter of which there may be several."""

    def another(self) -> Self:
        """One for a generation beside this one: the same weights and what was learned, a context of its own."""
        ...


class DrafterPool:
    """Hands out `first` and copies of it; generations take turns where it cannot be copied."""

    def __init__(self, first: Drafter) -> None:
        self.first = first
        self._idle: list[Drafter] = [first]
        self._turns = asyncio.Semaphore(MOST_COPIES if isinstance(first, Copyable) else 1)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[Drafter]:
        """A drafter that nobody else uses meanwhile; waits for one where there are too many generations."""
        async with self._turns:
            drafter = self._idle.pop() if self._idle else self._copy()
            try:
                yield drafter
            finally:
                self._idle.append(drafter)

    def _copy(self) -> Drafter:
        assert isinstance(self.first, Copyable)
        return self.first.another()
