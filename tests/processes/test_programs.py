"""The programs `swarm` and `swarm-node` on the command line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.hub_cache import add_to_cache

BIN = Path(sys.executable).parent
COMMANDS = ("generate", "chat", "models", "status", "demo", "bench", "simulate")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--blocks", "4:2"], "0 <= START < END"),
        (["demo", "--blocks", "6:9"], "which has 8"),
        (["demo", "--blocks", "x"], "is not a span"),
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
def test_node_that_cannot_start_says_why_in_one_line(arguments: list[str], words: str) -> None:
    result = subprocess.run([BIN / "swarm-node", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        "swarm",
        *(f"swarm {name}" for name in ["generate", "chat", "models", "status", "demo", "bench", "simulate"]),
        "swarm-node",
    ],
)
def test_help_has_usage_and_examples(words: str) -> None:
    program = words.split()
    command = [BIN / program[0], *program[1:], "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "usage:" in result.stdout
    assert "examples:" in result.stdout


def test_terminated_demo_ends_its_nodes() -> None:
    """As a supervisor does, send the signal to the command only, not to its process group."""
    command = [BIN / "swarm", "demo", "--model", "bundled"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True) as demo:
        try:
            assert demo.stdout is not None
            assert demo.stdout.readline().startswith("1/3 ")
            assert demo.stdout.readline().startswith("swarm-node ")
            demo.terminate()
            assert demo.wait(60) == 143
            with pytest.raises(ProcessLookupError):
                os.killpg(demo.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(demo.pid, signal.SIGKILL)


def test_node_and_client_find_a_revision_in_the_hub_cache(tmp_path: Path) -> None:
    """The machine is offline, and the main branch is not in the cache."""
    add_to_cache(tmp_path / "hub", "org/big", "demo", ref="v2")
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
            command = [BIN / "swarm", "generate", "def main():", "--model", "org/big", "--revision", "v2", "--json"]
            command += ["--peers", ready["address"], "--draft", "none", "--max-new-tokens", "4"]
            generated = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=120, check=True
            )
            assert len(json.loads(generated.stdout)["token_ids"]) == 4
        finally:
            node.terminate()
            assert node.wait(60) == 0


def test_demo_on_a_pipe_shows_its_progress_and_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    result = subprocess.run(
        [BIN / "swarm", "demo", "--model", "bundled", "--max-new-tokens", "16"],
        env=environment | {"HOME": str(home)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line[:4] for line in lines if line[1:3] == "/3"] == ["1/3 ", "2/3 ", "3/3 "]
    assert sum(line.startswith("swarm-node 127.0.0.1:") for line in lines) == 3
    assert "   16 tokens: plain decoding" in result.stdout
    assert "identical: plain decoding, trees and stock transformers gave the same tokens" in lines
    assert "swarm chat --model demo --registry $CODE" in lines[-3]
    assert result.stderr == ""
    assert not list(home.rglob("*"))
