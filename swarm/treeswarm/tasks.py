"""Background tasks: keep a reference while they run, cancel them, wait for their end; and races between attempts.

A background task that fails with an exception that nobody expected is a bug, and nobody awaits it: the log names it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from treeswarm.errors import SwarmError

T = TypeVar("T")

log = logging.getLogger(__name__)

# Seconds before a background loop that failed runs again; then twice as long each time, unless it ran for a while.
AGAIN_S, LONGEST_PAUSE_S = 1.0, 60.0

# Seconds between the starts of two attempts of a race: an answer on a local network comes sooner and saves the second
# one, and a dozen dead addresses before a living one cost less than one round trip across an ocean.
STAGGER_S = 0.02


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait until it has ended.  Its result or exception is discarded."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def keep_running(what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `work` until it returns or is cancelled.  An exception that it raises is logged, and it runs again.

    `what` names it in the log, as in "announcing".
    """
    pause_s, loop = AGAIN_S, asyncio.get_running_loop()
    while True:
        began = loop.time()
        try:
            return await work()
        except Exception as error:
            if loop.time() - began > LONGEST_PAUSE_S:
                pause_s = AGAIN_S
            _log_failure(f"{what} failed, again in {pause_s:.0f} s", error)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _log_failure(what: str, error: BaseException) -> None:
    is_expected = isinstance(error, SwarmError)
    reason = f"{error}" if is_expected else f"{type(error).__name__}: {error} (a bug: please report it)"
    log.error("%s: %s", what, reason, exc_info=None if is_expected else error)


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
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        # Tasks of a set may end with errors of the swarm, which their owners learn of in other ways.
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, SwarmError):
            _log_failure(f"the background task {task.get_coro().__qualname__} failed", error)  # type: ignore[union-attr]

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
