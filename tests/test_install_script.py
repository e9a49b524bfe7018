"""`scripts/install.py` shows that it works, on a terminal and elsewhere, and what failed."""

import subprocess
import sys
from pathlib import Path

from tests.support.terminal import run_on_terminal

SCRIPT = Path(__file__).parents[1] / "scripts" / "install.py"
SLOW = "import time; print('Collecting torch', flush=True); time.sleep(2.5)"


def step_command(job: str) -> list[str]:
    """Return the command of one step that runs Python code."""
    call = f"run('install 2/3: PyTorch', [sys.executable, '-c', {job!r}], 'get a newer pip')"
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); from install import run; {call}",
    ]


def test_elsewhere_dots_come_while_it_works() -> None:
    result = subprocess.run(step_command(SLOW), capture_output=True, text=True, timeout=60, check=True)
    title, _, dots = result.stdout.partition(" .")
    assert title == "install 2/3: PyTorch"
    assert dots.startswith(".")
    assert dots.endswith(" s\n")
    assert "Collecting" not in result.stdout


def test_a_terminal_shows_the_time_and_what_pip_does() -> None:
    with run_on_terminal(step_command(SLOW), {"TERM": "xterm"}) as terminal:
        terminal.read_until("install 2/3: PyTorch … ")
        terminal.read_until(" s  Collecting torch")
        terminal.read_until("\x1b[Kinstall 2/3: PyTorch: ")
        assert terminal.wait_for_exit() == 0


def test_a_failed_step_says_why_and_what_to_do() -> None:
    code = "print('ERROR: no matching distribution'); raise SystemExit(3)"
    result = subprocess.run(step_command(code), capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 3
    assert result.stderr == "ERROR: no matching distribution\nget a newer pip\n"
