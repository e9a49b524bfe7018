"""Mistakes on the command line are found before anything large is loaded, and missing extras are named in one line."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.program_runs import run_programs

from treeswarm.extras import MODULES, install_command

PEERS = ["--peers", "127.0.0.1:9"]
DEMO = ["--model", "demo", *PEERS]
TEXT_TASKS = [["swarm", "generate", "x"], ["swarm", "chat"]]


def client_mistakes(folder: Path) -> list[tuple[list[str], str]]:
    short, missing = folder / "short.key", folder / "missing.key"
    short.write_text("secret\n")
    short.chmod(0o600)
    empty = folder / "empty-model"
    empty.mkdir()
    shared = [
        (["--model", "demo"], "no nodes are given"),
        (PEERS, "no model is given"),
        (["--model", "demo", "--peers", "nowhere"], "'nowhere' is not an address"),
        (["--model", "demo", "--registry", "127.0.0.1:99999"], "names no registry"),
        (["--model", "demo", "--registry", "mqtt://host"], "no namespace"),
        ([*DEMO, "--swarm-key", str(short)], "too easy to guess"),
        ([*DEMO, "--swarm-key", str(missing)], "openssl rand -hex 32"),
        (["--model", str(folder / "nothing-here"), *PEERS], "there is no model"),
        (["--model", str(empty), *PEERS], "no model directory"),
        ([*DEMO, "--draft", str(folder / "nothing-here")], "there is no model"),
        ([*DEMO, "--tree-size", "99999"], "tree size 99999 is out of range"),
        ([*DEMO, "--emulate-link", "25"], "delay=25ms"),
        ([*DEMO, "--patience", "-1"], "--patience is -1"),
    ]
    sampling = [
        ([*DEMO, "--max-new-tokens", "0"], "--max-new-tokens is 0: give at least 1"),
        ([*DEMO, "--temperature", "-1"], "temperature -1.0 is out of range"),
        ([*DEMO, "--stop", ""], "--stop is empty"),
        ([*DEMO, "--max-new-tokens", "4000"], "the model's context is 2048"),
    ]
    return [
        *(([*task, *flags], words) for task in TEXT_TASKS for flags, words in [*shared, *sampling]),
        *((["swarm", "serve", *flags], words) for flags, words in shared),
        (["swarm", "generate", "", *DEMO], "the prompt is empty"),
        (["swarm", "generate", "y " * 3000, *DEMO], "the model's context is 2048"),
        (["swarm", "generate", "x", "--n", "0", *DEMO], "--n is 0"),
        (["swarm", "generate", "x", "--n", "2", "--explain", *DEMO], "leave --n"),
        (["swarm", "generate", "x", "--prompt-file", "y", *DEMO], "two prompts"),
        (["swarm", "generate", "x", *DEMO, "--registry", "127.0.0.1:9"], "not allowed with argument"),
        (["swarm", "serve", *DEMO, "--listen", "nowhere"], "'nowhere' is not an address"),
        (["swarm", "serve", *DEMO, "--max-concurrent", "0"], "--max-concurrent is 0"),
        (["swarm", "serve", *DEMO, "--api-key-file", str(missing)], "cannot be read"),
        (["swarm", "demo", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["swarm", "demo", "--prompt", ""], "the prompt is empty"),
        (["swarm", "simulate", "--nodes", "0"], "give at least"),
        (["swarm", "bench", "exact", "--nodes", "0"], "--nodes is 0"),
        (["swarm", "bench", "exact", "--model", "./nothing-here"], "there is no model"),
        (["swarm", "bench", "exact", "--beside"], "--beside is for ports"),
        (["swarm", "status", "--peers", "nowhere"], "'nowhere' is not an address"),
        (["swarm", "models", *PEERS, "--swarm-key", str(short)], "too easy to guess"),
    ]


def node_mistakes(folder: Path) -> list[tuple[list[str], str]]:
    damaged = folder / "damaged.pem"
    damaged.write_text("no key\n")
    damaged.chmod(0o600)
    return [
        (["./nothing-here"], "there is no model"),
        (["demo", "--blocks", "6:9"], "which has 8"),
        (["demo", "--listen", "nowhere"], "'nowhere' is not an address"),
        (["demo", "--announce", "nowhere"], "'nowhere' is not an address"),
        (["demo", "--registry", "static:127.0.0.1:4001"], "a node cannot announce itself"),
        (["demo", "--registry", "dht:nowhere"], "is no address in a DHT"),
        (["demo", "--swarm-key", str(folder / "missing.key")], "openssl rand -hex 32"),
        (["demo", "--identity", str(damaged)], "is damaged"),
        (["demo", "--emulate-link", "25"], "delay=25ms"),
        (["demo", "--metrics", "nowhere"], "'nowhere' is not an address"),
        (["demo", "--max-sessions", "0"], "--max-sessions is 0"),
        (["demo", "--grace", "-1"], "--grace is -1"),
        (["doctor", "demo", "--kv-tokens", "0"], "--kv-tokens 0"),
        (["pause"], "no node of yours runs here"),
    ]


def check_messages(cases: Sequence[tuple[list[str], str]], folder: Path) -> None:
    runs = run_programs([command for command, _ in cases], folder)
    for run, (command, words) in zip(runs, cases, strict=True):
        assert words in run.errors, (command, run.errors)
        assert run.status in (1, 2), command
        assert (run.output, run.loaded) == ("", []), command
        if run.status == 1:  # argparse shows the usage above its message
            assert len(run.errors.splitlines()) == 1, command


def test_client_mistakes_are_found_before_grpc_and_torch_are_loaded(tmp_path: Path) -> None:
    check_messages(client_mistakes(tmp_path), tmp_path)


def test_node_mistakes_are_found_before_grpc_and_torch_are_loaded(tmp_path: Path) -> None:
    check_messages([(["swarm-node", *flags], words) for flags, words in node_mistakes(tmp_path)], tmp_path)


@pytest.mark.parametrize(
    ("extra", "commands"),
    [
        (
            "node",
            [["swarm-node", "demo"], ["swarm-node", "doctor"], ["swarm", "demo"], ["swarm", "bench", "exact"]],
        ),
        ("draft", [["swarm", "generate", "x", *DEMO, "--draft", "demo-draft"]]),
        ("gguf", [["swarm", "generate", "x", "--model", "smollm2", *PEERS]]),  # before 98 MB are downloaded
        ("serve", [["swarm", "serve", *DEMO]]),
        ("mqtt", [["swarm", "models", "--registry", "mqtt://127.0.0.1:9/x"]]),
        ("plot", [["swarm", "simulate", "--nodes", "3", "--plot", "x.png"]]),
        ("bench", [["swarm", "bench", "exact"], ["swarm", "simulate"]]),
    ],
    ids=str,
)
def test_missing_extras_are_named_in_one_line(extra: str, commands: list[list[str]], tmp_path: Path) -> None:
    for run in run_programs(commands, tmp_path, hidden=MODULES[extra]):
        assert run.status == 1, run
        (line,) = run.errors.splitlines()
        assert line.startswith(f"{run.command[0]}: ")
        assert f": {install_command(extra)}" in line, line
        assert (run.output, run.loaded) == ("", [])
