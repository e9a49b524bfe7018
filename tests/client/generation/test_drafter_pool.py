"""Generations side by side: each with a drafter nobody else uses, or in turns where there is only one."""

import asyncio
from dataclasses import dataclass, field
from typing import Self

import pytest

from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.generation.drafter_pool import MOST_GENERATIONS, DrafterPool, PooledDrafter


@dataclass(eq=False)
class OfWhichThereAreMany(NoneDrafter):
    made: list["OfWhichThereAreMany"] = field(default_factory=list)

    def copy_for_new_generation(self) -> Self:
        self.made.append(made := type(self)())
        return made


async def most_at_once(seats: DrafterPool, wanted: int) -> tuple[int, set[PooledDrafter]]:
    """With so many that want one, how many had one at once, and which."""
    taken: list[PooledDrafter] = []
    seen: set[PooledDrafter] = set()
    most = 0

    async def work() -> None:
        nonlocal most
        async with seats.borrow() as seat:
            assert seat not in taken
            taken.append(seat)
            seen.add(seat)
            most = max(most, len(taken))
            await asyncio.sleep(0)
            taken.remove(seat)

    await asyncio.gather(*(work() for _ in range(wanted)))
    return most, seen


@pytest.mark.parametrize(("wanted", "most"), [(1, 1), (3, 3), (20, MOST_GENERATIONS)])
def test_as_many_as_are_wanted_and_not_too_many(wanted: int, most: int) -> None:
    first = OfWhichThereAreMany()
    found, seen = asyncio.run(most_at_once(DrafterPool(first), wanted))
    assert found == len(seen) == most == 1 + len(first.made)
    assert len({seat.memory for seat in seen}) == len({seat.drafter for seat in seen}) == most


def test_one_after_the_other_where_there_is_one() -> None:
    class Single:
        """Not even a method to copy it by."""

        name, begin, propose, observe = "single", NoneDrafter.begin, NoneDrafter.propose, NoneDrafter.observe

    most, seen = asyncio.run(most_at_once(DrafterPool(Single()), 5))  # type: ignore[arg-type]
    assert (most, len(seen)) == (1, 1)


def test_one_generation_after_the_other_keeps_what_was_learned() -> None:
    async def run() -> None:
        seats = DrafterPool(OfWhichThereAreMany())
        async with seats.borrow() as first:
            pass
        with pytest.raises(RuntimeError):
            async with seats.borrow() as second:
                raise RuntimeError
        async with seats.borrow() as third:
            assert first is second is third

    asyncio.run(run())
