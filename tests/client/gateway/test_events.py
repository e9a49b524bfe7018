"""The generations of a request are merged, and admitted within limits; the runs are scripted."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from treeswarm.errors import BadRequest
from treeswarm_client.gateway.admission import Admission
from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.errors import Busy
from treeswarm_client.gateway.events import MAX_QUEUED_EVENTS, AnswerAborted, FinishEvent, TokenEvent, merge_runs
from treeswarm_client.generation.run import Run, Token


def run(tokens: int, error: Exception | None = None, closed: list[int] | None = None) -> Run:
    scripted: Run

    async def generate() -> AsyncGenerator[Token, None]:
        try:
            for i in range(tokens):
                await asyncio.sleep(0)
                yield Token(i, f"{i} ", -0.5, i)
            if error is not None:
                raise error
            scripted.finish_reason = "stop"
        finally:
            if closed is not None:
                closed.append(tokens)

    scripted = Run(generate(), [1])
    return scripted


async def test_events_of_all_choices_arrive() -> None:
    events = [event async for event in merge_runs([run(3), run(2), run(1), run(4)], 2)]
    assert [sum(isinstance(event, TokenEvent) and event.choice == i for event in events) for i in range(4)] == [
        3,
        2,
        1,
        4,
    ]
    assert sorted(event.choice for event in events if isinstance(event, FinishEvent)) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [BadRequest("no"), RuntimeError("out of memory")], ids=["expected", "unexpected"])
@pytest.mark.parametrize("which", [0, 1])
async def test_error_of_one_run_ends_all(error: Exception, which: int) -> None:
    closed: list[int] = []
    runs = [run(1000, closed=closed), run(1000, closed=closed)]
    runs[which] = run(5, error, closed)
    with pytest.raises(type(error)):
        async for _ in merge_runs(runs, 2):
            pass
    assert 5 in closed


async def test_reader_timeout_frees_the_slots() -> None:
    closed: list[int] = []
    admission = Admission(GatewayLimits(generations=1, wait_s=1))
    async with admission.hold_slots(1) as slots:
        events = merge_runs(
            [run(10 * MAX_QUEUED_EVENTS, closed=closed)], 1, on_all_ended=slots.release, reader_timeout_s=0.05
        )
        await anext(events)
        async with asyncio.timeout(10):
            while admission.running:
                await asyncio.sleep(0.01)
        assert closed == [10 * MAX_QUEUED_EVENTS]
        with pytest.raises(AnswerAborted, match="nothing of the answer was read"):
            async for _ in events:
                pass
    assert admission.running == 0


async def test_closing_ends_all_runs() -> None:
    closed: list[int] = []
    events = merge_runs([run(10_000, closed=closed), run(9_999, closed=closed)], 2)
    for _ in range(10):
        await anext(events)
    await events.aclose()
    assert sorted(closed) == [9_999, 10_000]


class TestAdmission:
    """Slots are given out in order, and none is lost or given twice."""

    async def test_request_that_waits_too_long_is_refused(self) -> None:
        admission = Admission(GatewayLimits(generations=2, waiting=1, wait_s=0.05))
        async with admission.hold_slots(2):
            with pytest.raises(Busy, match="no free slot within"):
                async with admission.hold_slots(1):
                    raise AssertionError("the limit is exceeded")
            assert admission.waiting == 0
        assert admission.running == 0

    async def test_full_queue_refuses_at_once(self) -> None:
        admission = Admission(GatewayLimits(generations=1, waiting=1, wait_s=60))
        async with admission.hold_slots(1):
            waiting = asyncio.create_task(self._take_once(admission))
            await asyncio.sleep(0)
            with pytest.raises(Busy, match="1 requests wait already"):
                await self._take_once(admission)
            waiting.cancel()
            await asyncio.wait({waiting})
        assert (admission.running, admission.waiting) == (0, 0)

    async def test_small_requests_do_not_pass_a_large_one(self) -> None:
        admission, order = Admission(GatewayLimits(generations=4, waiting=9, wait_s=60)), []

        async def take(name: str, slots: int) -> None:
            async with admission.hold_slots(slots):
                order.append(name)
                await asyncio.sleep(0.01)

        async with admission.hold_slots(3):
            tasks = []
            for name, slots in (("large", 4), ("small", 1), ("tiny", 1)):
                tasks.append(asyncio.create_task(take(name, slots)))
                await asyncio.sleep(0)
            assert not order
        await asyncio.gather(*tasks)
        assert order[0] == "large"
        assert admission.running == 0

    async def _take_once(self, admission: Admission) -> None:
        async with admission.hold_slots(1):
            pass
