"""Background tasks: keep a reference while they run, cancel them, wait for their end."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait until it has ended.  Its result or exception is discarded."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


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
