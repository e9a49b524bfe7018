"""The end of a command that has started processes, on SIGTERM or Ctrl-C."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Terminated(BaseException):
    """SIGTERM came, and all processes that were started have been ended.

    It is no Exception, so that no handler of errors goes on after it.
    """


def run_until_terminated(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` as `asyncio.run` does, but treat SIGTERM like Ctrl-C: cancel `work`, which then ends its processes.

    Raises Terminated after SIGTERM, and KeyboardInterrupt after Ctrl-C.
    """
    return asyncio.run(_run_with_handler(work))


async def _run_with_handler(work: Coroutine[Any, Any, T]) -> T:
    loop, this_task = asyncio.get_running_loop(), asyncio.current_task()
    assert this_task is not None
    terminated = asyncio.Event()

    def terminate() -> None:
        """Cancel once only: `timeout` signals a program and then its whole group, and cleaning up must go on."""
        if not terminated.is_set():
            terminated.set()
            this_task.cancel()

    with contextlib.suppress(NotImplementedError):  # Windows has no SIGTERM
        loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await work
    except asyncio.CancelledError:
        if terminated.is_set() and not this_task.uncancel():
            raise Terminated from None
        raise
    finally:
        with contextlib.suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGTERM)
