"""An event loop whose time jumps to the next timer when nothing is ready: hours of network in milliseconds."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


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
        self.work_s = 0.0
        """How long whatever runs in an executor takes."""
        super().__init__(_NoWaiting(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """In the loop, when its time is over: a clock that jumps cannot wait for threads."""
        done: asyncio.Future[T] = self.create_future()

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


def run_virtually(work: Coroutine[Any, Any, T], work_s: float = 0.0) -> T:
    """Run a coroutine to its end on a virtual clock; threads' work takes `work_s`."""

    def loop() -> VirtualClockLoop:
        made = VirtualClockLoop()
        made.work_s = work_s
        return made

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work)
