"""The programs on a command line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.hub_cache import cached

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


def test_told_to_stop_a_command_takes_its_nodes_along() -> None:
    """As a supervisor tells it: the command alone, not everybody in its group."""
    command = [BIN / "swarm", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True) as demo:
        try:
            assert demo.stdout is not None
            assert demo.stdout.readline().startswith("swarm-node ")
            demo.terminate()
            assert demo.wait(60) == 143
            with pytest.raises(ProcessLookupError):
                os.killpg(demo.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(demo.pid, signal.SIGKILL)


def test_node_and_client_take_a_models_revision_from_the_cache(tmp_path: Path) -> None:
    """Offline; the main branch is not there."""
    cached(tmp_path / "hub", "org/big", "demo", ref="v2")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    serve = [BIN / "swarm-node", "org/big", "--listen", "127.0.0.1:0", "--registry", "none", "--threads", "1"]
    serve += ["--identity", tmp_path / "id.pem", "--log-format", "json"]
    refused = subprocess.run(serve, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
    assert "'org/big' is not in the cache" in refused.stderr
    with subprocess.Popen([*serve, "--revision", "v2"], env=environment, stdout=subprocess.PIPE, text=True) as node:
        try:
            assert node.stdout is not None
            ready = json.loads(node.stdout.readline())
            assert ready["revision"] == "v2"
            ask = [BIN / "swarm", "generate", "def main():", "--model", "org/big", "--revision", "v2", "--json"]
            ask += ["--peers", ready["address"], "--draft", "none", "--max-new-tokens", "4"]
            asked = subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=120, check=True)
            assert len(json.loads(asked.stdout)["token_ids"]) == 4
        finally:
            node.terminate()
            assert node.wait(60) == 0
