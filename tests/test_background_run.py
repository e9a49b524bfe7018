"""The tests also end when they run in the background of a script, where SIGINT is ignored."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# One test that starts a program and interrupts it, as those do that hung.
INNER = """
import signal, subprocess, sys

def test_program_that_is_interrupted_ends():
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT
        finally:
            process.kill()
"""


def test_interrupted_programs_end_where_sigint_is_ignored(tmp_path: Path) -> None:
    inner = tmp_path / "test_inner.py"
    inner.write_text((ROOT / "tests" / "conftest.py").read_text("utf-8") + INNER, "utf-8")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(inner)]
    # What a shell does for `pytest … &`.
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *pytest]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
