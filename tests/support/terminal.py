"""A person at a terminal: a program on a pseudo-terminal, what it shows, and keys to press."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

CTRL_C, CTRL_D, TAB = b"\x03", b"\x04", b"\t"
# The first terminal that a session's leader opens becomes its own: so Ctrl-C reaches the program as it does elsewhere.
LEADER = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"


class AtATerminal:
    """Its screen is read on until something is seen."""

    def __init__(self, process: "subprocess.Popen[bytes]", screen: int) -> None:
        self.process = process
        self._screen = screen
        self._unseen = ""

    def press(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def type(self, line: str) -> None:
        """With the return key behind it."""
        self.press(line.encode() + b"\r")

    def press_until(self, keys: bytes, words: str) -> None:
        """Again if nothing is seen of it, as a person would: Python's `input` loses a Ctrl-C that comes between a key
        it has shown and its waiting for the next one (once in 3000 on a busy machine)."""
        for _ in range(5):
            self.press(keys)
            with contextlib.suppress(AssertionError):
                self.see(words, within_s=12.0)
                return
        raise AssertionError(f"{words!r} was not shown")

    def see(self, words: str, within_s: float = 60.0) -> str:
        """Read on until `words` are shown; gives what was shown up to their end."""
        end = time.monotonic() + within_s
        while words not in self._unseen:
            if not self._more(end):
                raise AssertionError(f"{words!r} was not shown, but {self._unseen!r}")
        seen, _, self._unseen = self._unseen.partition(words)
        return seen + words

    def see_some(self, within_s: float = 60.0) -> str:
        """Read on until anything but space is shown; gives it."""
        end = time.monotonic() + within_s
        while not self._unseen.strip():
            if not self._more(end):
                raise AssertionError("nothing more was shown")
        return self._unseen

    def left(self, within_s: float = 60.0) -> int:
        """Its exit status, once it has ended."""
        end = time.monotonic() + within_s
        while self._more(end):
            pass
        try:
            return self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end, but showed {self._unseen!r}") from None

    def _more(self, end: float) -> bool:
        """Read what is shown next; false if nothing came until `end`, or nobody is at the other side any more."""
        ready, _, _ = select.select([self._screen], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return False
        try:
            shown = os.read(self._screen, 65536)
        except OSError:  # how Linux says so
            return False
        self._unseen += shown.decode(errors="replace")
        return bool(shown)


@contextlib.contextmanager
def at_a_terminal(command: Sequence[str | Path], environment: Mapping[str, str]) -> Iterator[AtATerminal]:
    """Killed on leaving, if it has not ended.  A dumb terminal, unless the environment says another: what is typed and
    shown is all there is to see."""
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
        yield AtATerminal(process, screen)
