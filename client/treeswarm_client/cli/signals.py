"""How a command that has started processes ends when it is told to."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Terminated(BaseException):
    """SIGTERM came, and everything that was begun has been ended.  No Exception: nobody should go on after it."""


def run_until_terminated(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, for which SIGTERM is also what Ctrl-C is: `work` is cancelled, and ends its processes before
    this one ends.  Raises Terminated then, KeyboardInterrupt after Ctrl-C."""
    return asyncio.run(_until_told(work))


async def _until_told(work: Coroutine[Any, Any, T]) -> T:
    loop, here = asyncio.get_running_loop(), asyncio.current_task()
    assert here is not None
    told = asyncio.Event()

    def tell() -> None:
        """Once: `timeout` tells a program and then its whole group, and leaving must not be broken off."""
        if not told.is_set():
            told.set()
            here.cancel()

    with contextlib.suppress(NotImplementedError):  # Windows knows no SIGTERM
        loop.add_signal_handler(signal.SIGTERM, tell)
    try:
        return await work
    except asyncio.CancelledError:
        if told.is_set() and not here.uncancel():
            raise Terminated from None
        raise
    finally:
        with contextlib.suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGTERM)
