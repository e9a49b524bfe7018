"""A terminal that may not read: Ctrl-S, a connection asleep.  Whoever writes to it then waits, so a thread does."""

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

# A warning or two beside the picture; what comes faster than a terminal takes it is not for eyes.
WAITING = 16
# A terminal that reads has shown everything in milliseconds.
LAST_WORDS_S = 1.0


@dataclass(eq=False)
class TerminalWriter:
    """Calls that write, made one after the other in a daemon thread.  One that raises, as all do when the terminal is
    gone, is the last."""

    _calls: "queue.Queue[Callable[[], object] | None]" = field(default_factory=lambda: queue.Queue(WAITING))
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Everything is shown, so that a new picture would be at once."""
        return self._calls.unfinished_tasks == 0

    def put(self, call: Callable[[], object]) -> None:
        """Make it soon, or never if the terminal has not read for long.  Returns at once."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._calls.put_nowait(call)

    def close(self, within_s: float = LAST_WORDS_S) -> bool:
        """Whether everything has been shown, and the thread is over."""
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=within_s)
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(Exception):
            while (call := self._calls.get()) is not None:
                call()
                self._calls.task_done()
