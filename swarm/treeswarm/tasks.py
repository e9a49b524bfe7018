"""Background tasks: keep a reference while they run, cancel them, wait for their end; and races between attempts."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from treeswarm.errors import SwarmError

T = TypeVar("T")

# Seconds between the starts of two attempts of a race: an answer on a local network comes sooner and saves the second
# one, and a dozen dead addresses before a living one cost less than one round trip across an ocean.
STAGGER_S = 0.02


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait until it has ended.  Its result or exception is discarded."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def first_success(attempts: Sequence[Callable[[], Coroutine[Any, Any, T]]], stagger_s: float = STAGGER_S) -> T:
    """Return the result of the attempt that succeeds first, and cancel the others.

    Attempts run side by side.  Each starts `stagger_s` after the one before it, or as soon as any attempt has failed.
    Raises ExceptionGroup with the SwarmErrors of all, in the order of the attempts, if every one fails.  Any other
    exception ends the race.
    """
    tasks: list[asyncio.Task[T]] = []
    try:
        while len(tasks) < len(attempts) or not all(task.done() for task in tasks):
            if len(tasks) < len(attempts):
                tasks.append(asyncio.ensure_future(attempts[len(tasks)]()))
            waiting = [task for task in tasks if not task.done()]
            timeout_s = stagger_s if len(tasks) < len(attempts) else None
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not isinstance(task.exception(), SwarmError):
                    return task.result()
        errors = [error for task in tasks if isinstance(error := task.exception(), SwarmError)]
        raise ExceptionGroup("every attempt failed", errors)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class TaskSet:
    """The background tasks of one owner.

    The event loop itself holds only weak references to tasks, so an owner must keep them until they end.  A task leaves
    the set by itself when it is done.
    """

    def __init__(self) -> None:
        """Start with no tasks."""
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        """Return the number of tasks that have not ended."""
        return len(self._running)

    def __iter__(self) -> Iterator["asyncio.Task[Any]"]:
        """Iterate over a copy, so that tasks may end meanwhile."""
        return iter(tuple(self._running))

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run `work` as a task of the running event loop and return the task."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def cancel(self) -> None:
        """Cancel every task except the one that calls this."""
        for task in self._running - {asyncio.current_task()}:
            task.cancel()

    async def join(self) -> None:
        """Wait until every task has ended, except the one that calls this.  Exceptions are discarded."""
        await asyncio.gather(*(self._running - {asyncio.current_task()}), return_exceptions=True)

    async def close(self) -> None:
        """Cancel every task and wait until all have ended."""
        self.cancel()
        await self.join()
