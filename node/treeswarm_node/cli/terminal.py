"""Write to a terminal that may not be reading.

After Ctrl-S, or on a sleeping connection, a terminal reads nothing and the writer has to wait: so a thread writes.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

# Number of calls that may wait: a warning or two beside the picture.  Output that comes faster than a terminal
# takes it is not worth showing.
WAITING = 16
# A terminal that reads has shown everything within milliseconds.
CLOSE_S = 1.0


@dataclass(eq=False)
class TerminalWriter:
    """Runs calls that write, one after the other, in a daemon thread.

    After a call that raises, which every call does once the terminal is gone, no other is made.
    """

    _calls: "queue.Queue[Callable[[], object] | None]" = field(default_factory=lambda: queue.Queue(WAITING))
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether everything is shown, so that a new picture would be shown at once."""
        return self._calls.unfinished_tasks == 0

    def put(self, call: Callable[[], object]) -> None:
        """Queue a call and return at once; drop it if the terminal has not read for so long that the queue is full."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._calls.put_nowait(call)

    def close(self, within_s: float = CLOSE_S) -> bool:
        """Wait for the thread to end; return whether it ended, with everything shown."""
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=within_s)
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(Exception):
            while (call := self._calls.get()) is not None:
                call()
                self._calls.task_done()
