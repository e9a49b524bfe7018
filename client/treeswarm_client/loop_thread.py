"""An event loop in a thread of its own, for callers without one."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from treeswarm.errors import BadRequest

T = TypeVar("T")
_END: Final = object()
# On Windows a wait without a timeout is not interrupted by Ctrl-C.
LISTEN_S = 0.2


class LoopThread:
    """Runs coroutines for any number of other threads, until it is stopped.

    The thread is a daemon: a program that does not stop it still ends.
    """

    def __init__(self, name: str) -> None:
        """Create the thread under this name; `start` starts it."""
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        """Guards `_loop`: every call handed to the loop comes before its end."""
        self._stopped: asyncio.Event
        self._calls: set[asyncio.Task[Any]] = set()
        """Tasks that callers wait for.  Used by the loop's thread alone."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread, as leaving `with` does."""
        self.stop(_nothing())

    @property
    def running(self) -> bool:
        """Whether coroutines can be run."""
        return self._loop is not None

    def start(self) -> None:
        """Start the thread and wait until its loop runs.  May be called once."""
        self._thread.start()
        self._ready.wait()

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        """Run `job` and return its result, or raise its error.

        If the caller is interrupted (Ctrl-C), the job is cancelled and has ended before this returns.  Raises
        BadRequest if the thread does not run, stops meanwhile, or is the caller's own.
        """
        call = _Call(job, self._calls)
        loop = None
        try:
            with self._lock:
                loop = None if threading.current_thread() is self._thread else self._loop
                if loop is not None:
                    loop.call_soon_threadsafe(call.begin)
            if loop is not None:
                call.wait()
        except BaseException:
            # An interrupt may come at any point, even before the job has begun.
            if loop is not None:
                loop.call_soon_threadsafe(call.cancel)
                call.wait()
            raise
        if loop is None:
            job.close()
            raise BadRequest(
                "this client is not open: use it inside `with`, before close(), and not from its own callbacks"
            )
        return call.result()

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Yield the items as they come.  The generator is closed when the caller stops early."""
        try:
            while (item := self.run(_next(items))) is not _END:
                yield item  # type: ignore[misc]  # _END is no T
        finally:
            if self.running:
                self.run(items.aclose())

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what callers wait for, run `last`, and end the thread.  Raises what `last` raises."""
        if not self.running:
            last.close()
            return
        try:
            self.run(self._cancel_all())
            self.run(last)
        finally:
            with self._lock:
                loop, self._loop = self._loop, None
                if loop is not None:
                    loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    def _main(self) -> None:
        asyncio.run(self._run_until_stopped())

    async def _run_until_stopped(self) -> None:
        self._stopped = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        await self._stopped.wait()

    async def _cancel_all(self) -> None:
        others = self._calls - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class _Call(Generic[T]):
    """One job in the loop, and a caller in another thread that waits for its end."""

    def __init__(self, job: Coroutine[Any, Any, T], calls: set[asyncio.Task[Any]]) -> None:
        self._job = job
        self._calls = calls
        self._task: asyncio.Task[T] | None = None
        self.ended = threading.Event()

    def wait(self) -> None:
        """Wait in the caller's thread until the job has ended."""
        while not self.ended.wait(LISTEN_S):
            pass

    def begin(self) -> None:
        if self.ended.is_set():
            return
        self._task = asyncio.get_running_loop().create_task(self._job)
        self._calls.add(self._task)
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self._job.close()
            self.ended.set()

    def result(self) -> T:
        """Return the job's result once it has ended, or raise its error."""
        assert self._task is not None
        try:
            return self._task.result()
        except asyncio.CancelledError:
            raise BadRequest("the client was closed while this ran") from None

    def _end(self, task: "asyncio.Task[T]") -> None:
        self._calls.discard(task)
        self.ended.set()


async def _next(items: AsyncGenerator[T, None]) -> T | object:
    try:
        return await anext(items)
    except StopAsyncIteration:
        return _END


async def _nothing() -> None:
    pass
