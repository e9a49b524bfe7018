"""What Ctrl-C does to a program before and after its own work: it ends the process with one line.

The programs import this module first, so it imports nothing that takes time.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

TYPE_CHECKING = False  # importing typing's own would take longer than all of the above
if TYPE_CHECKING:
    import threading
    from types import FrameType
    from typing import NoReturn

# Exit statuses after Ctrl-C and after SIGTERM.
INTERRUPTED = 130
TERMINATED = 143
STOPPED = "stopped"
"""The one line after either."""
ERASE_LINE = b"\r\x1b[K"
# Seconds after which a step counts as slow, and is shown: on a busy machine the parser alone takes two.
SLOW_S = 0.5
ASKING = "asking the swarm"
"""What a command that reads the state of a swarm does meanwhile."""


@contextlib.contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """Let Ctrl-C end the process with one line, at once, while something large is imported.

    A KeyboardInterrupt could come from any line of any module; some catch it, others leave threads that wait.  Where
    the signal is ignored, or has a handler already, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end_on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def ticking(text: str, after_s: float = 0.0) -> Iterator[None]:
    """Show on a terminal, while something large is imported or others are asked, what is being done and for how long.

    Nothing is shown of what takes less than `after_s` seconds.
    """
    if not os.isatty(2) or os.environ.get("TERM", "dumb") == "dumb":
        yield
        return
    import threading  # noqa: PLC0415

    ended = threading.Event()
    thread = threading.Thread(target=_tick, args=(text, after_s, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            os.write(2, ERASE_LINE)


def _tick(text: str, after_s: float, ended: "threading.Event") -> None:
    if ended.wait(after_s):
        return
    seconds = round(after_s)
    while True:
        with contextlib.suppress(OSError):
            os.write(2, ERASE_LINE + f"{text} … {seconds} s".encode())
        if ended.wait(1.0):
            return
        seconds += 1


def end_process(status: int, line: str = "") -> "NoReturn":
    """End the process with a last line, without waiting for threads: one may be loading a model."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if line:
        write_line(line)
    os._exit(status)


def _end_on_signal(number: int, frame: "FrameType | None") -> "NoReturn":
    if os.isatty(2):
        os.write(2, ERASE_LINE)
    write_line(STOPPED)
    os._exit(INTERRUPTED)


def write_line(line: str) -> None:
    """Write a line to standard error, on a terminal below what is there: the ^C at least."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode() if os.isatty(2) else f"{line}\n".encode())
