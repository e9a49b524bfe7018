"""An event loop whose time jumps to the next timer when nothing is ready: hours of network in milliseconds.

Work for threads takes a time of one's choosing, or the processor time that it really took, as if every thread had a
processor of its own.
"""

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# What work takes between two looks at the clock is let pass when it is so much: threads' turns take time as well.
GRAIN_S = 0.0005


class _NoWaiting(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Never sleeps: tells the loop how long it would have."""

    def __init__(self, loop: "VirtualClockLoop") -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if not found and timeout:
            self._loop.now += timeout
        return found


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """`time()` is `now`, and `now` moves only when everybody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.work_s: float | None = 0.0
        """How long whatever runs in an executor takes; None: as much processor time as it took."""
        super().__init__(_NoWaiting(self))
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="virtual")
        self._job = threading.local()
        self._under_way: set[_Measured[Any]] = set()

    def time(self) -> float:
        return self.now

    def clock(self) -> float:
        """For the loop and for measured work alike, where the time that the work took so far passes first, unless it
        is hardly any."""
        job: _Measured[Any] | None = getattr(self._job, "now", None)
        if job is None:
            return self.now
        spent_s = time.thread_time() - job.since
        if spent_s > GRAIN_S:
            job.park(0.0)
            spent_s = 0.0
        return self.now + spent_s

    def rest(self, seconds: float) -> None:
        """In measured work, let so much time pass; elsewhere nothing."""
        job: _Measured[Any] | None = getattr(self._job, "now", None)
        if job is not None:
            job.park(seconds)

    def forgive(self, seconds: float) -> None:
        """In measured work, let so much of what it took since the last look not count: a faster machine's."""
        job: _Measured[Any] | None = getattr(self._job, "now", None)
        if job is not None:
            job.since += seconds

    def run_in_executor(self, executor: Any, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """In the loop, when its time is over: a clock that jumps cannot wait for threads."""
        done: asyncio.Future[T] = self.create_future()
        if self.work_s is None:
            _Measured(self, done, lambda: work(*args)).begin()
            return done

        def run() -> None:
            if done.cancelled():
                return
            try:
                done.set_result(work(*args))
            except Exception as error:
                done.set_exception(error)

        if self.work_s:
            self.call_later(self.work_s, run)
        else:
            run()
        return done

    def close(self) -> None:
        for job in self._under_way:
            job.abandon()
        self._threads.shutdown(wait=False)
        super().close()


class _Measured(Generic[T]):
    """Work in a thread that runs only while the loop stands, so that nobody takes processor time from anybody.

    Whenever it parks, and at its end, as much virtual time passes as it took of the processor; then it goes on.
    """

    def __init__(self, loop: VirtualClockLoop, done: "asyncio.Future[T]", work: Callable[[], T]) -> None:
        self._loop, self._done, self._work = loop, done, work
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self.since = self._due_s = 0.0
        self._outcome: Callable[[], None] | None = None
        self._abandoned = False

    def begin(self) -> None:
        self._loop._under_way.add(self)
        self._loop._threads.submit(self._run)
        self._wait()

    def park(self, more_s: float) -> None:
        """In its thread."""
        self._due_s = time.thread_time() - self.since + more_s
        self._parked.release()
        self._go.acquire()
        if self._abandoned:
            raise SystemExit
        self.since = time.thread_time()

    def abandon(self) -> None:
        """Nobody waits for it any more: its thread may end."""
        self._abandoned = True
        self._go.release()

    def _wait(self) -> None:
        self._parked.acquire()
        self._loop.call_later(self._due_s, self._after)

    def _after(self) -> None:
        if self._outcome is None:
            self._go.release()
            self._wait()
            return
        self._loop._under_way.discard(self)
        if not self._done.cancelled():
            self._outcome()

    def _run(self) -> None:
        self._loop._job.now = self
        self.since = time.thread_time()
        try:
            result = self._work()
            self._outcome = lambda: self._done.set_result(result)
        except BaseException as error:
            raised = error
            self._outcome = lambda: self._done.set_exception(raised)
        self._due_s = time.thread_time() - self.since
        self._loop._job.now = None
        self._parked.release()


def run_virtually(work: Coroutine[Any, Any, T], work_s: float | None = 0.0) -> T:
    """Run a coroutine to its end on a virtual clock; threads' work takes `work_s`, or what it really took."""

    def loop() -> VirtualClockLoop:
        made = VirtualClockLoop()
        made.work_s = work_s
        return made

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work)
