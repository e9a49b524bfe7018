"""A loop thread runs coroutines for threads without a loop."""

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from treeswarm.errors import BadRequest
from treeswarm_client.loop_thread import LoopThread


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    loop_thread = LoopThread("test")
    loop_thread.start()
    yield loop_thread
    loop_thread.stop(_nothing())


async def _nothing() -> None:
    return


async def _double(number: int) -> int:
    await asyncio.sleep(0)
    if number < 0:
        raise ValueError(number)
    return 2 * number


def test_many_threads_share_one_loop(thread: LoopThread) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: thread.run(_double(n)), range(50))) == [2 * n for n in range(50)]
    with pytest.raises(ValueError, match="-1"):
        thread.run(_double(-1))


def test_stopping_an_iteration_closes_the_generator(thread: LoopThread) -> None:
    ended = threading.Event()

    async def count() -> AsyncGenerator[int, None]:
        try:
            for number in range(5):
                await asyncio.sleep(0)
                yield number
        finally:
            ended.set()

    assert list(thread.iterate(count())) == [0, 1, 2, 3, 4]
    assert ended.is_set()
    ended.clear()
    numbers = thread.iterate(count())
    assert next(numbers) == 0
    numbers.close()  # type: ignore[attr-defined]  # a generator, as is every early `break`
    assert ended.is_set()


def test_stopping_the_thread_ends_waiting_calls() -> None:
    thread = LoopThread("test")
    thread.start()
    begun, cleaned = threading.Event(), threading.Event()

    async def long() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: thread.run(long()))
        assert begun.wait(10)
        thread.stop(_nothing())
        assert cleaned.is_set()
        with pytest.raises(BadRequest, match="closed while"):
            waiting.result()
    assert not thread.running
    with pytest.raises(BadRequest, match="not open"):
        thread.run(_double(1))
    thread.stop(_nothing())


def test_an_interrupted_caller_leaves_nothing_running(thread: LoopThread) -> None:
    """Ctrl-C interrupts the wait for an item; the generator takes a while to end."""
    ended = threading.Event()

    async def slow() -> AsyncGenerator[int, None]:
        yield 1
        try:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            ended.set()

    items = thread.iterate(slow())
    assert next(items) == 1
    with pytest.raises(KeyboardInterrupt):
        next(items)
    assert ended.is_set()
    assert thread.run(_double(2)) == 4


def test_a_callback_in_the_loop_cannot_wait_for_the_loop(thread: LoopThread) -> None:
    async def impatient() -> int:
        return thread.run(_double(1))

    with pytest.raises(BadRequest, match="callbacks"):
        thread.run(impatient())
