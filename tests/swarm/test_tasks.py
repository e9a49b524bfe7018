"""A task set keeps its tasks while they run, forgets them when they end, and cancels the others, never its caller."""

import asyncio
from functools import partial
from itertools import pairwise

import pytest

from treeswarm.errors import Unreachable
from treeswarm.tasks import STAGGER_S, TaskSet, cancelled, first_success, keep_running
from treeswarm_bench.virtual_clock import run_virtually


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


async def attempt(after_s: float, result: int | None, begun: list[float]) -> int:
    begun.append(asyncio.get_running_loop().time())
    await asyncio.sleep(after_s)
    if result is None:
        raise Unreachable(f"nothing after {after_s} s")
    return result


def race(*attempts: tuple[float, int | None], stagger_s: float = STAGGER_S) -> tuple[float, int, list[float]]:
    """Run a race on a virtual clock; return its time, its result and when each attempt began."""
    begun: list[float] = []

    async def main() -> tuple[float, int]:
        result = await first_success([partial(attempt, *each, begun) for each in attempts], stagger_s)
        assert len(asyncio.all_tasks()) == 1
        return asyncio.get_running_loop().time(), result

    return *run_virtually(main()), begun


def test_black_holes_before_an_answer_cost_the_stagger_only() -> None:
    time_s, result, begun = race(*[(3600.0, None)] * 4, (0.05, 7))
    assert (time_s, result) == (pytest.approx(4 * STAGGER_S + 0.05), 7)
    assert begun == pytest.approx([i * STAGGER_S for i in range(5)])


def test_an_early_answer_saves_the_other_attempts() -> None:
    assert race((0.01, 1), (0.0, 2), stagger_s=0.02) == (pytest.approx(0.01), 1, [0.0])


def test_a_failure_starts_the_next_attempt_at_once() -> None:
    race_s, result, begun = race((0.001, None), (0.001, None), (0.001, 3), stagger_s=10.0)
    assert (race_s, result) == (pytest.approx(0.003), 3)
    assert begun == pytest.approx([0.0, 0.001, 0.002])


def test_a_race_without_a_winner_raises_every_error() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        race((2.0, None), (1.0, None))
    assert [str(error) for error in caught.value.exceptions] == ["nothing after 2.0 s", "nothing after 1.0 s"]


def test_a_background_loop_that_fails_is_logged_and_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    began: list[float] = []

    async def fail_five_times() -> None:
        began.append(asyncio.get_running_loop().time())
        if len(began) <= 5:
            raise KeyError("tree")

    run_virtually(keep_running("announcing", fail_five_times))
    pauses = [later - earlier for earlier, later in pairwise(began)]
    assert pauses == pytest.approx([1, 2, 4, 8, 16], abs=0.01)
    assert "announcing failed, again in 1 s: KeyError: 'tree' (a bug: please report it)" in caplog.text
    assert "fail_five_times" in caplog.text, "the traceback is logged"


def test_a_background_loop_ends_when_cancelled() -> None:
    async def scenario() -> None:
        task = asyncio.create_task(keep_running("waiting", asyncio.Event().wait))  # type: ignore[arg-type]
        await asyncio.sleep(5)
        await cancelled(task)
        assert task.cancelled()

    run_virtually(scenario())


async def test_an_unexpected_failure_of_a_task_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(error: Exception) -> None:
        raise error

    tasks = TaskSet()
    tasks.start(fail(ZeroDivisionError("by zero")))
    tasks.start(fail(Unreachable("no node answers")))
    await tasks.join()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "ZeroDivisionError: by zero" in caplog.text
