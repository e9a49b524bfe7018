"""Install treeswarm from this checkout into an environment of its own, and show on every console how far that is.

`make demo` and `make test` run it with the Python that the environment is made from; it needs no package.
"""

from __future__ import annotations  # an older Python must come as far as the line that refuses it

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
# Nothing is shown for at most so long.
TICK_S = 1.0
# Number of pip's last lines that are shown if it fails.
LAST_LINES = 20
INTERRUPTED = 130
ASIDES = ("attempting uninstall", "found existing", "uninstalling", "successfully uninstalled", "requirement already")
"""Beginnings of lines that pip writes while it does something else."""


class Step:
    """One line of the console about a running command: its title, the seconds so far, and what it does now."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.redraws = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.start = time.monotonic()
        if not self.redraws:
            self.write(self.title + " ")

    def tick(self, activity: str) -> None:
        """Show that the command still runs."""
        if not self.redraws:
            self.write(".")
            return
        line = f"{self.title} … {self.seconds} s  {activity}"
        width = shutil.get_terminal_size().columns - 1
        self.write("\r\x1b[K" + line[:width])

    def end(self) -> None:
        """End the line."""
        self.write(f"\r\x1b[K{self.title}: {self.seconds} s\n" if self.redraws else f" {self.seconds} s\n")

    @property
    def seconds(self) -> int:
        """Whole seconds since the step began."""
        return round(time.monotonic() - self.start)

    def write(self, text: str) -> None:
        """Write text that is seen at once."""
        sys.stdout.write(text)
        sys.stdout.flush()


def activity(lines: deque[str]) -> str:
    """Return the last of pip's lines that says what it does; while it copies packages, that is an older one."""
    return next((line for line in reversed(tuple(lines)) if not line.lower().startswith(ASIDES)), "")


def run(title: str, command: list[str], hint: str = "") -> None:
    """Run a command as one step.  If it fails, print its last lines and the hint, and exit with its status."""
    step = Step(title)
    lines: deque[str] = deque([""], LAST_LINES)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    assert process.stdout is not None
    output = process.stdout
    reader = threading.Thread(target=lambda: lines.extend(map(str.strip, output)), daemon=True)
    reader.start()
    try:
        while reader.is_alive():
            step.tick(activity(lines))
            reader.join(TICK_S)
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        step.end()
        sys.exit(INTERRUPTED)
    step.end()
    if status:
        print("\n".join(filter(None, (*lines, hint))), file=sys.stderr)
        sys.exit(status)


def main() -> None:
    """Make the environment if there is none, and install PyTorch, then treeswarm with the extras asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", help="extras to install, separated by commas")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv", help="folder of the environment")
    parser.add_argument("--torch-index", default="", help="package index from which PyTorch comes (default: pip's)")
    parser.add_argument("--pip-flags", default="", help="further flags of pip")
    args = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        sys.exit("treeswarm needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = next(line for line in constraints if line.startswith("torch=="))
    python = args.environment / "bin" / "python"
    if not (args.environment / "bin" / "pip").exists():
        hint = "this Python cannot make environments; on Debian and Ubuntu: apt install python3-venv"
        run("install 1/3: the environment", [sys.executable, "-m", "venv", str(args.environment)], hint)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *args.pip_flags.split()]
    index = ["--index-url", args.torch_index] if args.torch_index else []
    run("install 2/3: PyTorch", [*pip, *index, torch])
    packages = ["-c", "constraints.txt", "-e", f".[{args.extras}]", "-e", "./bench"]
    run("install 3/3: treeswarm and the other packages", [*pip, *packages])
    # Programs of an environment with this folder keep in it what they fetch, not in the user's home.
    (args.environment / "cache").mkdir(exist_ok=True)


if __name__ == "__main__":
    main()
