"""A request's generations, with runs that do what tests want."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from treeswarm.errors import BadRequest
from treeswarm_client.gateway.admission import Admission
from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.errors import Busy
from treeswarm_client.gateway.events import AHEAD, AnswerAborted, FinishEvent, TokenEvent, follow
from treeswarm_client.generation.run import Run, Token


def run(tokens: int, error: Exception | None = None, closed: list[int] | None = None) -> Run:
    made: Run

    async def say() -> AsyncGenerator[Token, None]:
        try:
            for i in range(tokens):
                await asyncio.sleep(0)
                yield Token(i, f"{i} ", -0.5, i)
            if error is not None:
                raise error
            made.finish_reason = "stop"
        finally:
            if closed is not None:
                closed.append(tokens)

    made = Run(say(), [1])
    return made


async def test_all_choices_are_heard_to_their_ends() -> None:
    events = [event async for event in follow([run(3), run(2), run(1), run(4)], 2)]
    assert [sum(isinstance(e, TokenEvent) and e.choice == i for e in events) for i in range(4)] == [3, 2, 1, 4]
    assert sorted(e.choice for e in events if isinstance(e, FinishEvent)) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [BadRequest("no"), RuntimeError("out of memory")], ids=["told", "unexpected"])
@pytest.mark.parametrize("which", [0, 1])
async def test_an_error_of_one_ends_all(error: Exception, which: int) -> None:
    closed: list[int] = []
    runs = [run(1000, closed=closed), run(1000, closed=closed)]
    runs[which] = run(5, error, closed)
    with pytest.raises(type(error)):
        async for _ in follow(runs, 2):
            pass
    assert 5 in closed


async def test_who_reads_nothing_keeps_no_room() -> None:
    closed: list[int] = []
    admission = Admission(GatewayLimits(generations=1, wait_s=1))
    async with admission.places(1) as places:
        events = follow([run(10 * AHEAD, closed=closed)], 1, idle=places.give_back, reader_s=0.05)
        await anext(events)
        async with asyncio.timeout(10):
            while admission.running:
                await asyncio.sleep(0.01)
        assert closed == [10 * AHEAD]
        with pytest.raises(AnswerAborted, match="nothing of the answer was read"):
            async for _ in events:
                pass
    assert admission.running == 0


async def test_closing_ends_what_runs() -> None:
    closed: list[int] = []
    events = follow([run(10_000, closed=closed), run(9_999, closed=closed)], 2)
    for _ in range(10):
        await anext(events)
    await events.aclose()
    assert sorted(closed) == [9_999, 10_000]


class TestAdmission:
    """First come, first served, and no place is lost or given twice."""

    async def test_who_waits_too_long_is_told_and_forgotten(self) -> None:
        admission = Admission(GatewayLimits(generations=2, waiting=1, wait_s=0.05))
        async with admission.places(2):
            with pytest.raises(Busy, match="no turn within"):
                async with admission.places(1):
                    raise AssertionError("there was no room")
            assert admission.waiting == 0
        assert admission.running == 0

    async def test_a_line_that_is_full_is_told_at_once(self) -> None:
        admission = Admission(GatewayLimits(generations=1, waiting=1, wait_s=60))
        async with admission.places(1):
            waiting = asyncio.create_task(self._once(admission))
            await asyncio.sleep(0)
            with pytest.raises(Busy, match="1 requests wait already"):
                await self._once(admission)
            waiting.cancel()
            await asyncio.wait({waiting})
        assert (admission.running, admission.waiting) == (0, 0)

    async def test_small_requests_do_not_pass_a_large_one(self) -> None:
        admission, order = Admission(GatewayLimits(generations=4, waiting=9, wait_s=60)), []

        async def ask(name: str, places: int) -> None:
            async with admission.places(places):
                order.append(name)
                await asyncio.sleep(0.01)

        async with admission.places(3):
            tasks = []
            for name, places in (("large", 4), ("small", 1), ("tiny", 1)):
                tasks.append(asyncio.create_task(ask(name, places)))
                await asyncio.sleep(0)
            assert not order
        await asyncio.gather(*tasks)
        assert order[0] == "large"
        assert admission.running == 0

    async def _once(self, admission: Admission) -> None:
        async with admission.places(1):
            pass
