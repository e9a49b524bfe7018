"""An event loop whose time jumps to the next timer when nothing is ready: hours of network in milliseconds.

Work in an executor takes a time that the caller chooses.  Alternatively it takes the processor time that it really
took, as if every thread had a processor of its own.
"""

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Work that took more than this since its last look at the clock lets that time pass.  A switch between threads costs
# time as well, so it is not worth one for less.
GRAIN_S = 0.0005
THREADS = 64


def no_time() -> float:
    """Return 0: a meter that stands still, for work whose time is scripted."""
    return 0.0


class _NoWaiting(selectors.DefaultSelector):
    """A selector that never sleeps: it moves the loop's time forward by what it would have slept."""

    def __init__(self, loop: "VirtualClockLoop") -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not ready and timeout:
            self._loop.now += timeout
        return ready


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` is `now`, which moves only when every task waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.work_s: float | None = 0.0
        """Seconds that work in an executor takes; None: the time of `meter` that it took."""
        self.meter: Callable[[], float] = time.thread_time
        """Clock of measured work.  With `no_time`, only the time that `sleep_in_work` lets pass counts."""
        super().__init__(_NoWaiting(self))
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="virtual")
        self._job = threading.local()
        self._under_way: set[MeasuredWork[Any]] = set()

    def time(self) -> float:
        return self.now

    def clock(self) -> float:
        """Return the virtual time, in the loop and in measured work alike.

        In measured work, the time that the work took so far passes first, unless it is below GRAIN_S.
        """
        job = self._current_job()
        if job is None:
            return self.now
        spent_s = self.meter() - job.since
        if spent_s > GRAIN_S:
            job.park(0.0)
            spent_s = 0.0
        return self.now + spent_s

    def sleep_in_work(self, seconds: float) -> None:
        """Let that many seconds pass for measured work; do nothing elsewhere."""
        job = self._current_job()
        if job is None:
            return
        if self.meter is no_time and self._is_idle_for(seconds):
            self.now += seconds
        else:
            job.park(seconds)

    def _is_idle_for(self, seconds: float) -> bool:
        """Return whether nothing else is due in that time, so that work need not hand over to the loop meanwhile."""
        timers = self._scheduled  # type: ignore[attr-defined]
        return not self._ready and (not timers or timers[0].when() > self.now + seconds)  # type: ignore[attr-defined]

    def discount(self, seconds: float) -> None:
        """Do not count that many seconds of what measured work took since its last look at the clock.

        A bench simulates faster machines with it.  It does nothing outside measured work.
        """
        job = self._current_job()
        if job is not None:
            job.since += seconds

    def _current_job(self) -> "MeasuredWork[Any] | None":
        return getattr(self._job, "now", None)

    def run_in_executor(self, executor: Any, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run work in the loop once its time has passed: a clock that jumps cannot wait for threads."""
        done: asyncio.Future[T] = self.create_future()
        if self.work_s is None:
            MeasuredWork(self, done, lambda: work(*args)).begin()
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


class MeasuredWork(Generic[T]):
    """Work in a thread that runs only while the loop stands still, so that no two of them share a processor.

    Whenever it parks, and at its end, as much virtual time passes as it took of the processor; then it continues.
    """

    def __init__(self, loop: VirtualClockLoop, done: "asyncio.Future[T]", work: Callable[[], T]) -> None:
        self._loop, self._done, self._work = loop, done, work
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self.since = self._due_s = 0.0
        self._outcome: Callable[[], None] | None = None
        self._abandoned = False

    def begin(self) -> None:
        """Start the work; the loop stands still until it parks or ends."""
        self._loop._under_way.add(self)
        self._loop._threads.submit(self._run)
        self._wait()

    def park(self, more_s: float) -> None:
        """Wait, in the work's own thread, until the time that it took and `more_s` seconds have passed."""
        self._due_s = self._loop.meter() - self.since + more_s
        self._parked.release()
        self._go.acquire()
        if self._abandoned:
            raise SystemExit
        self.since = self._loop.meter()

    def abandon(self) -> None:
        """Let the thread end: no task waits for its result any more."""
        self._abandoned = True
        self._go.release()

    def _wait(self) -> None:
        self._parked.acquire()
        self._loop.call_later(self._due_s, self._continue)

    def _continue(self) -> None:
        if self._outcome is None:
            self._go.release()
            self._wait()
            return
        self._loop._under_way.discard(self)
        if not self._done.cancelled():
            self._outcome()

    def _run(self) -> None:
        self._loop._job.now = self
        self.since = self._loop.meter()
        try:
            result = self._work()
            self._outcome = lambda: self._done.set_result(result)
        except BaseException as error:
            raised = error
            self._outcome = lambda: self._done.set_exception(raised)
        self._due_s = self._loop.meter() - self.since
        self._loop._job.now = None
        self._parked.release()


def run_virtually(work: Coroutine[Any, Any, T], work_s: float | None = 0.0) -> T:
    """Run a coroutine to its end on a virtual clock.

    Work in threads takes `work_s` seconds, or with None the processor time that it really took.
    """

    def new_loop() -> VirtualClockLoop:
        loop = VirtualClockLoop()
        loop.work_s = work_s
        return loop

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(work)


async def run_virtually_in_thread(work: Coroutine[Any, Any, T], work_s: float | None = 0.0) -> T:
    """Do what `run_virtually` does, in a thread beside the running loop.

    When the caller is cancelled, the coroutine is cancelled too, and this function waits until it has ended.
    """
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await work

    thread = asyncio.ensure_future(asyncio.to_thread(run_virtually, cancellable(), work_s))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        for loop, task in running:
            loop.call_soon_threadsafe(task.cancel)
        await asyncio.wait({thread})
        raise
