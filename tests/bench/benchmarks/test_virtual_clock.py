"""The virtual clock runs beside a usual event loop, counts measured work, and ends when it is cancelled."""

import asyncio
import time

import pytest

from treeswarm_bench.benchmarks.wan.virtual import charged
from treeswarm_bench.fixed_size import FixedSizePolicy
from treeswarm_bench.virtual_clock import VirtualClockLoop, run_virtually, run_virtually_in_thread


def spin(seconds: float) -> None:
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


async def test_hours_pass_at_once_beside_a_usual_loop() -> None:
    async def sleep_for_an_hour() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    start = time.monotonic()
    assert await run_virtually_in_thread(sleep_for_an_hour()) == pytest.approx(3600)
    assert time.monotonic() - start < 60


async def test_cancelled_caller_waits_until_the_coroutine_has_ended() -> None:
    ended = False

    async def tick() -> None:
        nonlocal ended
        try:
            while True:
                await asyncio.sleep(1)
        finally:
            ended = True

    task = asyncio.create_task(run_virtually_in_thread(tick()))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


def test_the_planners_own_time_counts() -> None:
    class SlowPolicy(FixedSizePolicy):
        def nodes_to_draft(self) -> int:
            spin(0.004)
            return self.size

    async def ask() -> tuple[int, float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        return charged(loop, SlowPolicy(3)).nodes_to_draft(), loop.time()

    nodes, seconds = run_virtually(ask(), work_s=None)
    assert nodes == 3
    assert 0.004 <= seconds < 0.4


def test_measured_work_takes_its_processor_time_in_parallel() -> None:
    async def two_jobs() -> float:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(None, spin, 0.02) for _ in range(2)))
        return loop.time()

    assert 0.019 < run_virtually(two_jobs(), work_s=None) < 0.035


def test_discounted_work_takes_less_time() -> None:
    async def job() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)

        def work() -> None:
            spin(0.02)
            loop.discount(0.015)

        await loop.run_in_executor(None, work)
        return loop.time()

    assert 0.004 < run_virtually(job(), work_s=None) < 0.012
