"""Run a program on a pseudo-terminal, read what it shows, and press keys."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

CTRL_C, CTRL_D, TAB = b"\x03", b"\x04", b"\t"
# The first terminal that a session leader opens becomes its controlling terminal, so that Ctrl-C reaches the program as
# it does elsewhere.
LEADER = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"


class TerminalSession:
    """A program on a terminal, with the output that no call has returned yet."""

    def __init__(self, process: "subprocess.Popen[bytes]", screen: int) -> None:
        self.process = process
        self._screen = screen
        self._unread = ""

    def press(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._screen, keys)

    def type_line(self, line: str) -> None:
        """Type a line, and press the return key."""
        self.press(line.encode() + b"\r")

    def press_until(self, keys: bytes, words: str) -> None:
        """Press keys until `words` are shown, again if they are not shown for a while, as a person would.

        Python's `input` loses a Ctrl-C that comes between a key it has shown and its waiting for the next one, once in
        3000 times on a busy machine.
        """
        for _ in range(5):
            self.press(keys)
            with contextlib.suppress(AssertionError):
                self.read_until(words, within_s=12.0)
                return
        raise AssertionError(f"{words!r} was not shown")

    def read_until(self, words: str, within_s: float = 60.0) -> str:
        """Read until `words` are shown, and return what was shown up to their end."""
        end = time.monotonic() + within_s
        while words not in self._unread:
            if not self._read_more(end):
                raise AssertionError(f"{words!r} was not shown, but {self._unread!r}")
        before, _, self._unread = self._unread.partition(words)
        return before + words

    def read_some(self, within_s: float = 60.0) -> str:
        """Read until anything but white space is shown, and return it."""
        end = time.monotonic() + within_s
        while not self._unread.strip():
            if not self._read_more(end):
                raise AssertionError("nothing more was shown")
        return self._unread

    def echoes(self) -> bool:
        """Return whether the terminal shows what is typed by itself."""
        return bool(termios.tcgetattr(self._screen)[3] & termios.ECHO)

    def wait_for_exit(self, within_s: float = 60.0) -> int:
        """Wait for the program to end, and return its exit status."""
        end = time.monotonic() + within_s
        while self._read_more(end):
            pass
        try:
            return self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program did not end, but showed {self._unread!r}") from None

    def read_rest(self) -> str:
        """Return what was shown since the last call that returned something, once the program has ended."""
        rest, self._unread = self._unread, ""
        return rest

    def _read_more(self, end: float) -> bool:
        """Read what is shown next; return False if nothing came until `end`, or no process has the terminal open."""
        ready, _, _ = select.select([self._screen], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return False
        try:
            output = os.read(self._screen, 65536)
        except OSError:  # Linux raises it once no process has the terminal open
            return False
        self._unread += output.decode(errors="replace")
        return bool(output)


@contextlib.contextmanager
def run_on_terminal(command: Sequence[str | Path], environment: Mapping[str, str]) -> Iterator[TerminalSession]:
    """Run a program on a terminal, and kill it on leaving if it has not ended.

    The terminal is a dumb one unless the environment names another, so that the output is only what is typed and shown.
    """
    screen, other = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, screen)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", LEADER, *map(str, command)],
                stdin=other,
                stdout=other,
                stderr=other,
                start_new_session=True,
                env={**os.environ, "TERM": "dumb", **environment},
            )
        finally:
            os.close(other)
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield TerminalSession(process, screen)
