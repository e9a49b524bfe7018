"""The programs on a command line."""

import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
COMMANDS = ("generate", "chat", "models", "status", "demo", "bench", "simulate")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--blocks", "4:2"], "0 <= START < END"),
        (["demo", "--blocks", "6:9"], "which has 8"),
        (["demo", "--blocks", "x"], "no span"),
        (["./no-such-model"], "no model"),
        (["demo", "--device", "cuda:7"], "--device cpu"),
        (["demo", "--listen", "nowhere"], "HOST:PORT"),
        (["demo", "--kv-tokens", "0"], "--kv-tokens"),
        (["demo", "--emulate-link", "25"], "delay=25ms"),
        (["demo", "--swarm-key", "./no-such-key"], "openssl rand -hex 32"),
        (["demo", "--identity", "/dev/null/identity.pem"], "--identity PATH"),
    ],
    ids=range(10),
)
def test_a_node_that_cannot_start_says_why_in_one_line(arguments: list[str], words: str) -> None:
    done = subprocess.run([BIN / "swarm-node", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "swarm",
        *(f"swarm {name}" for name in ["generate", "chat", "models", "status", "demo", "bench", "simulate"]),
        "swarm-node",
    ],
)
def test_help_helps(words: str) -> None:
    program = words.split()
    command = [BIN / program[0], *program[1:], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "usage:" in done.stdout
    assert "examples:" in done.stdout
