"""An event loop in a thread of its own, for callers that have none."""

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, Final, TypeVar

from treeswarm.errors import BadRequest

T = TypeVar("T")
_END: Final = object()


class LoopThread:
    """Runs coroutines for any number of other threads, until it is stopped.

    The thread is a daemon: a program that forgets to stop it ends all the same.
    """

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Event
        self._tasks: set[asyncio.Task[Any]] = set()
        """What callers wait for; touched in the thread alone."""

    @property
    def running(self) -> bool:
        return self._loop is not None

    def start(self) -> None:
        """Once."""
        self._thread.start()
        self._ready.wait()

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        """What `job` returns or raises.  An interrupted caller (Ctrl-C) leaves it cancelled.  Raises BadRequest where
        the thread does not run, stops meanwhile, or is the caller's own."""
        if self._loop is None or threading.current_thread() is self._thread:
            job.close()
            raise BadRequest(
                "this client is not open: use it inside `with`, before close(), and not from its own callbacks"
            )
        waiting = asyncio.run_coroutine_threadsafe(self._tracked(job), self._loop)
        try:
            return waiting.result()
        except concurrent.futures.CancelledError:
            raise BadRequest("the client was closed while this ran") from None
        except BaseException:
            waiting.cancel()
            raise

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items as they come.  Whoever stops early ends the generator too."""
        try:
            while (item := self.run(_next(items))) is not _END:
                yield item  # type: ignore[misc]  # _END is no T
        finally:
            if self.running:
                self.run(items.aclose())

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what callers wait for, run `last`, end the thread.  Raises what `last` does."""
        if self._loop is None:
            last.close()
            return
        try:
            self.run(self._cancel_all())
            self.run(last)
        finally:
            loop, self._loop = self._loop, None
            loop.call_soon_threadsafe(self._over.set)
            self._thread.join()

    def _main(self) -> None:
        asyncio.run(self._until_over())

    async def _until_over(self) -> None:
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        await self._over.wait()

    async def _tracked(self, job: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await job
        finally:
            self._tasks.discard(task)

    async def _cancel_all(self) -> None:
        others = self._tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _next(items: AsyncGenerator[T, None]) -> T | object:
    return await anext(items, _END)
