"""Generations at once each borrow a drafter of their own; a drafter that cannot be copied is lent in turns."""

import asyncio
from dataclasses import dataclass, field
from typing import Self

import pytest

from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.generation.drafter_pool import MOST_GENERATIONS, DrafterPool, PooledDrafter


@dataclass(eq=False)
class CountedDrafter(NoneDrafter):
    """A drafter that remembers its copies."""

    copies: list["CountedDrafter"] = field(default_factory=list)

    def copy_for_new_generation(self) -> Self:
        self.copies.append(copy := type(self)())
        return copy


async def borrow_at_once(pool: DrafterPool, generations: int) -> tuple[int, set[PooledDrafter]]:
    """Let that many generations borrow at once.  Returns how many had a drafter at the same time, and which."""
    borrowed: list[PooledDrafter] = []
    seen: set[PooledDrafter] = set()
    most = 0

    async def generate() -> None:
        nonlocal most
        async with pool.borrow() as pooled:
            assert pooled not in borrowed
            borrowed.append(pooled)
            seen.add(pooled)
            most = max(most, len(borrowed))
            await asyncio.sleep(0)
            borrowed.remove(pooled)

    await asyncio.gather(*(generate() for _ in range(generations)))
    return most, seen


@pytest.mark.parametrize(("generations", "most"), [(1, 1), (3, 3), (20, MOST_GENERATIONS)])
def test_generations_get_copies_up_to_the_limit(generations: int, most: int) -> None:
    first = CountedDrafter()
    at_once, seen = asyncio.run(borrow_at_once(DrafterPool(first), generations))
    assert at_once == len(seen) == most == 1 + len(first.copies)
    assert len({pooled.memory for pooled in seen}) == len({pooled.drafter for pooled in seen}) == most


def test_a_drafter_that_cannot_be_copied_is_lent_in_turns() -> None:
    class Single:
        """A drafter without a method to copy it."""

        name, begin, propose, observe = "single", NoneDrafter.begin, NoneDrafter.propose, NoneDrafter.observe

    most, seen = asyncio.run(borrow_at_once(DrafterPool(Single()), 5))  # type: ignore[arg-type]
    assert (most, len(seen)) == (1, 1)


def test_the_next_generation_gets_the_same_drafter() -> None:
    """So what was learned is kept, also after a generation that raised."""

    async def run() -> None:
        pool = DrafterPool(CountedDrafter())
        async with pool.borrow() as first:
            pass
        with pytest.raises(RuntimeError):
            async with pool.borrow() as second:
                raise RuntimeError
        async with pool.borrow() as third:
            assert first is second is third

    asyncio.run(run())
