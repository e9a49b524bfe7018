"""An event loop in a thread of its own, so that the terminal may be waited for while links and nodes go on."""

import asyncio
import queue
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
# On Windows a wait without an end hears no Ctrl-C.
LISTEN_S = 0.2


class Background:
    """`with Background() as background: background.run(coroutine)`, from one thread, the main one for Ctrl-C."""

    def __init__(self) -> None:
        self._started: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="swarm", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop, self._stop = self._started.get()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What it returns or raises.  On Ctrl-C it is cancelled and KeyboardInterrupt raised once it has ended; on a
        second Ctrl-C at once."""
        began: list[asyncio.Task[T]] = []
        ended = threading.Event()

        def begin() -> None:
            began.append(asyncio.get_running_loop().create_task(work))
            began[0].add_done_callback(lambda _: ended.set())

        self._loop.call_soon_threadsafe(begin)
        try:
            _wait(ended)
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(lambda: began[0].cancel())  # noqa: PLW0108  # not begun, perhaps
            _wait(ended)
            if not began[0].cancelled():
                began[0].exception()  # heard: Ctrl-C is what is told
            raise
        return began[0].result()

    async def _live(self) -> None:
        stop = asyncio.Event()
        self._started.put((asyncio.get_running_loop(), stop))
        await stop.wait()


def _wait(ended: threading.Event) -> None:
    while not ended.wait(LISTEN_S):
        pass
