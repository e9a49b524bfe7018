"""Ctrl-C ends every program with status 130 and one line, whatever it does at that moment."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import pytest
from tests.support.terminal import CTRL_C, run_on_terminal

# A program that presses Ctrl-C itself, when a module is about to be imported: in a worker thread too.
PROGRAM = """
import importlib, os, signal, sys

program, interrupted, *sys.argv[1:] = sys.argv[1:]

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            os.kill(os.getpid(), signal.SIGINT)

main = importlib.import_module(program).main
sys.meta_path.insert(0, Interrupting())
sys.exit(main())
"""
SWARM, NODE = "treeswarm_client.cli.main", "treeswarm_node.cli.main"


@contextlib.contextmanager
def silent_peer() -> Iterator[str]:
    """Yield the address of a machine that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    home = str(tmp_path_factory.mktemp("home"))
    return {"HOME": home, "XDG_STATE_HOME": home, "XDG_CACHE_HOME": home, "TERM": "xterm-256color", "COLUMNS": "100"}


@pytest.mark.parametrize(
    ("program", "module", "arguments"),
    [
        (SWARM, "treeswarm.errors", ["status", "--peers", "PEER"]),
        (SWARM, "numpy", ["generate", "x", "--model", "demo", "--peers", "PEER"]),
        (SWARM, "grpc", ["models", "--peers", "PEER"]),
        (SWARM, "torch", ["generate", "x", "--model", "demo", "--draft", "demo-draft", "--peers", "PEER"]),
        (SWARM, "torch", ["chat", "--model", "demo", "--draft", "demo-draft", "--peers", "PEER"]),
        (SWARM, "uvicorn", ["serve", "--model", "demo", "--draft", "none", "--peers", "PEER"]),
        (NODE, "treeswarm.errors", ["demo"]),
        (NODE, "torch", ["demo", "--registry", "none"]),
        (NODE, "torch", ["doctor"]),
        (NODE, "grpc", ["demo", "--registry", "none"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_interrupt_during_imports_is_one_line(
    program: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> None:
    with silent_peer() as peer:
        command = [peer if word == "PEER" else word for word in arguments]
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, program, module, *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, **environment},
        )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["generate", "x", "--model", "demo", "--draft", "none", "--peers", "PEER"], "finding nodes"),
        (["chat", "--model", "demo", "--draft", "none", "--peers", "PEER"], "finding nodes"),
        (["status", "--peers", "PEER"], "asking the swarm"),
        (["models", "--peers", "PEER"], "asking the swarm"),
        (["doctor", "--peers", "PEER"], "checking"),
        (["simulate", "--nodes", "3000"], "simulated hours"),
        (["demo"], "starting three nodes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_interrupt_while_something_is_shown_clears_it(
    arguments: Sequence[str], shown: str, environment: Mapping[str, str]
) -> None:
    with silent_peer() as peer:
        command = [sys.executable, "-m", SWARM, *(peer if word == "PEER" else word for word in arguments)]
        with run_on_terminal(command, environment) as terminal:
            terminal.read_until(shown)
            terminal.press(CTRL_C)
            assert terminal.wait_for_exit() == 130
            left = terminal.read_rest()
    assert "Traceback" not in left
    after_erasing = re.split(r"\x1b\[2?K", left)[-1]
    assert after_erasing.split() == ["stopped"]


def test_ignored_interrupt_stays_ignored(environment: Mapping[str, str]) -> None:
    """A background job of a script is not ended by a Ctrl-C that is meant for the script."""
    program = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{PROGRAM}"
    result = subprocess.run(
        [sys.executable, "-c", program, SWARM, "treeswarm.errors", "generate", "", "--model", "demo", "--peers", "h:1"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (1, "swarm: the prompt is empty: give some text to continue\n")
