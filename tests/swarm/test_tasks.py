"""A task set keeps its tasks while they run, forgets them when they end, and cancels the others, never its caller."""

import asyncio

from treeswarm.tasks import TaskSet, cancelled


async def test_tasks_leave_the_set_when_done() -> None:
    tasks, gate = TaskSet(), asyncio.Event()
    task = tasks.start(gate.wait())
    assert (len(tasks), list(tasks)) == (1, [task])
    gate.set()
    await task
    await asyncio.sleep(0)
    assert len(tasks) == 0


async def test_close_cancels_and_waits() -> None:
    tasks, ended = TaskSet(), []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    tasks.start(work("a"))
    tasks.start(work("b"))
    await asyncio.sleep(0)
    await tasks.close()
    assert sorted(ended) == ["a", "b"]
    assert len(tasks) == 0


async def test_close_from_within_spares_the_caller() -> None:
    tasks = TaskSet()
    other = tasks.start(asyncio.Event().wait())

    async def closing() -> str:
        await tasks.close()
        return "still here"

    assert await tasks.start(closing()) == "still here"
    assert other.cancelled()


async def test_failures_are_discarded_by_join() -> None:
    tasks = TaskSet()

    async def fail() -> None:
        raise ValueError("broken")

    failed = tasks.start(fail())
    await tasks.join()
    assert isinstance(failed.exception(), ValueError)


async def test_cancelled_waits_for_the_end() -> None:
    task = asyncio.create_task(asyncio.Event().wait())
    await cancelled(task)
    assert task.cancelled()
