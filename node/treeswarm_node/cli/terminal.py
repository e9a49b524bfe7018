"""The owner's terminal: write to one that may not be reading, and read its keys.

After Ctrl-S, or on a sleeping connection, a terminal reads nothing and the writer has to wait: so a thread writes.
"""

import asyncio
import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

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


@dataclass(eq=False)
class Keyboard:
    """Reads single keys from the terminal, without their echo.  Ctrl-C and the like work as before."""

    on_key: Callable[[str], None]
    _settings: list[Any] | None = None
    """Settings of the terminal before, or None while nothing is read."""

    def open(self) -> bool:
        """Begin; return whether there is a keyboard: a terminal as input, in whose foreground this process runs."""
        if termios is None or not sys.stdin.isatty() or not _in_foreground():
            return False
        self._settings = termios.tcgetattr(0)
        tty.setcbreak(0, termios.TCSADRAIN)
        asyncio.get_running_loop().add_reader(0, self._read)
        return True

    def close(self) -> None:
        """Give the terminal back as it was."""
        if self._settings is None:
            return
        asyncio.get_running_loop().remove_reader(0)
        settings, self._settings = self._settings, None
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(0, termios.TCSANOW, settings)

    def _read(self) -> None:
        try:
            keys = os.read(0, 64)
        except OSError:
            keys = b""
        if not keys:  # the terminal is gone
            self.close()
        for key in keys.decode(errors="ignore"):
            self.on_key(key)


def _in_foreground() -> bool:
    """Return whether this process may read the terminal that is its input: else the system would stop it."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # it is the terminal of another session
        return False
