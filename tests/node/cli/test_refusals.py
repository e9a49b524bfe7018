"""`swarm-node doctor` refuses what `swarm-node` with the same flags would refuse, in the same words."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from treeswarm.errors import SwarmError
from treeswarm.programs.health import Finding, Verdict
from treeswarm_node.cli import doctor
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.cli.checks import check_config
from treeswarm_node.membership.identity_file import claim_identity
from treeswarm_node.serve import run_node

QUIET = ("--registry", "none", "--listen", "127.0.0.1:0", "--num-blocks", "1", "--kv-tokens", "64")


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep identities out of the user's folder, and leave out the checks of the device, which take seconds."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(doctor, "check_device_numerics", lambda config, device: Finding.ok("numerics", ""))


async def refusal_of_node(arguments: list[str]) -> str:
    """Start a node as the program does, which must be refused, and return the words."""
    config = read_config(arguments, {})
    try:
        check_config(config)
        async with run_node(config):
            pass
    except SwarmError as error:
        return str(error)
    pytest.fail("the node was not refused")


async def refusals_of_doctor(arguments: list[str]) -> list[str]:
    findings = await doctor.examine(read_config(arguments, {}))
    return [f"{finding.message}: {finding.next_step}" for finding in findings if finding.verdict is Verdict.FAIL]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["demo", "--blocks", "0:99"],
        ["demo", "--registry", "static:127.0.0.1:4001"],
        ["demo", "--registry", "dht:nonsense"],
        ["demo", "--announce", "nonsense"],
        ["demo", "--listen", "nonsense"],
        ["demo", "--drive", "--drive-draft", "./nowhere+ngram"],
        ["demo", "--metrics", "nonsense"],
        ["demo", "--emulate-link", "fast"],
        ["demo", "--max-sessions", "0"],
        ["demo", "--grace", "-1"],
        ["demo", "--device", "cuda:99"],
        ["demo", "--device", "abacus"],
        ["demo", "--memory", "1KiB"],
        ["demo", "--swarm-key", "/no/such/key"],
        ["/no/such/model"],
    ],
    ids=" ".join,
)
def test_doctor_refuses_bad_flags_in_the_nodes_words(flags: list[str]) -> None:
    defaults = [
        part
        for flag, value in zip(QUIET[::2], QUIET[1::2], strict=True)
        if flag not in flags and not (flag == "--num-blocks" and "--memory" in flags)
        for part in (flag, value)
    ]
    arguments = [*flags, *defaults]
    assert asyncio.run(refusal_of_node(arguments)) in asyncio.run(refusals_of_doctor(arguments))


def test_doctor_refuses_an_identity_that_a_node_would_refuse(tmp_path: Path) -> None:
    damaged, held = tmp_path / "damaged.pem", tmp_path / "held.pem"
    damaged.write_bytes(b"not a key")
    with claim_identity(held):
        for path in (damaged, held):
            arguments = ["demo", *QUIET, "--identity", str(path)]
            assert asyncio.run(refusal_of_node(arguments)) in asyncio.run(refusals_of_doctor(arguments))


@pytest.mark.parametrize("flag", ["--listen", "--metrics"])
def test_doctor_refuses_ports_that_are_taken(flag: str, taken_port: int) -> None:
    quiet = QUIET if flag == "--metrics" else [part for part in QUIET if part not in ("--listen", "127.0.0.1:0")]
    arguments = ["demo", *quiet, flag, f"127.0.0.1:{taken_port}"]
    assert str(taken_port) in asyncio.run(refusal_of_node(arguments))
    (refusal,) = asyncio.run(refusals_of_doctor(arguments))
    assert refusal.startswith(f"cannot listen on 127.0.0.1:{taken_port}")
