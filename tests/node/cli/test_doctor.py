"""`swarm-node doctor`: real machines, ports, nodes and registries; what is judged from them is pure."""

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch

from treeswarm.programs.health import Finding, Verdict
from treeswarm.protocol.spans import Span
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.registry.mqtt import MqttRegistry
from treeswarm.registry.spec import Broker
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_client.local_swarm import LocalSwarm, local_swarm
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.cli.doctor import _opening, reached
from treeswarm_node.cli.machine_checks import attention, free_port, judged
from treeswarm_node.model.device_check import TOLERANCES, NumericsCheck, check_numerics
from treeswarm_node.reachability import reachability as place

HERE = "0.0.0.0:4001"
YES, NO = place.DialResult(True, "203.0.113.5:4001"), place.DialResult(False)


@pytest.mark.parametrize(
    ("announced", "verdicts", "verdict", "said"),
    [
        (None, [YES, YES, NO], Verdict.OK, "others reach it at 203.0.113.5:4001"),
        (None, [NO, NO], Verdict.WARN, "most do not reach"),
        (None, [], Verdict.WARN, "no node could say"),
        ("203.0.113.5:0", [YES], Verdict.OK, "203.0.113.5:4001"),
        ("203.0.113.5:4001", [NO, NO], Verdict.FAIL, "nobody reaches 203.0.113.5:4001, which --announce says"),
    ],
)
def test_what_others_say(announced: str | None, verdicts: list[place.DialResult], verdict: Verdict, said: str) -> None:
    found = reached(place.decide_address(announced, HERE, verdicts), verdicts, HERE)
    assert (found.verdict, said in found.message) == (verdict, True), found
    assert bool(found.next_step) == (verdict is not Verdict.OK)


def test_numerics_fail_only_where_the_class_asked_for_does() -> None:
    tried = [
        NumericsCheck("float32", "none", 0.0),
        NumericsCheck("float16", "none", 1.3),
        NumericsCheck("float32", "nf4", None, "no library"),
    ]
    assert judged(tried, "float32", "none").verdict is Verdict.OK
    wrong = judged(tried, "float16", "none")
    assert (wrong.verdict, wrong.next_step) == (Verdict.FAIL, "serve in another: --dtype float32")
    assert "float16 (off by 1.3)" in wrong.message
    assert "nf4 weights (no library)" in wrong.message
    assert "without --quantization" in judged(tried, "float32", "nf4").next_step
    assert not NumericsCheck("float32", "none", float("nan")).passes


async def test_without_a_model_a_broker_is_asked_for_all_and_a_dht_wants_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[str | None]()

    async def start(broker: Broker, model: str | None, node: str | None = None) -> MemoryRegistry:
        asked.append(model)
        return MemoryRegistry(model)

    monkeypatch.setattr(MqttRegistry, "start", start)
    opening = _opening("mqtt://broker/ns", None, MemoryNetwork().transport())
    assert not isinstance(opening, Finding)
    await opening()
    assert asked == [None]
    peer = "dht:/ip4/10.0.0.1/tcp/4002/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
    told = _opening(peer, None, MemoryNetwork().transport())
    assert isinstance(told, Finding)
    assert (told.verdict, told.next_step) == (Verdict.WARN, "name a MODEL to see its nodes")


def test_this_machines_cpu_computes_every_class_right() -> None:
    tried = check_numerics(torch.device("cpu"))
    assert [(one.dtype, one.quantization) for one in tried] == list(TOLERANCES)
    assert all(one.passes for one in tried), tried


def test_attention_is_checked_as_the_node_would_choose_it() -> None:
    said = {}
    for wanted in ("auto", "flash"):
        config = read_config(["demo", "--attention", wanted], {})
        said[wanted] = attention(config, torch.device("cpu")).message
    assert said == {"auto": "plain torch", "flash": "torch-flash agrees with plain torch"}


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = free_port(f"127.0.0.1:{taken.getsockname()[1]}")
    assert found.verdict is Verdict.FAIL
    assert "is the node running already" in found.next_step
    assert free_port("127.0.0.1:0").verdict is Verdict.OK
    assert free_port("192.0.2.1:4001").verdict is Verdict.FAIL
    assert free_port("nonsense").next_step


async def run_doctor(*arguments: str) -> tuple[int | None, dict[str, dict[str, str]]]:
    """Its exit status, and its findings by check."""
    command = [sys.executable, "-m", "treeswarm_node.cli.main", "doctor", *arguments, "--json"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, errors = await asyncio.wait_for(process.communicate(), 120)
    assert errors == b""
    told = json.loads(said)
    assert told["ok"] is (process.returncode == 0)
    assert all(finding["next"] for finding in told["findings"] if finding["verdict"] != "ok")
    return process.returncode, {finding["check"]: finding for finding in told["findings"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node() -> AsyncIterator[LocalSwarm]:
    async with local_swarm("demo", [Span(0, 1)], registry="dht:", flags=("--kv-tokens", "1024")) as swarm:
        yield swarm


# Not the disk, memory and open files of whatever machine runs the tests.
MUST_BE_WELL = (
    "python",
    "software",
    "device",
    "port",
    "registry",
    "nodes",
    "clock",
    "reachability",
    "numerics",
    "attention",
)
LOCAL = ("--listen", "127.0.0.1:0")


@pytest.mark.asyncio(loop_scope="module")
async def test_all_is_well_beside_a_node_that_runs(node: LocalSwarm) -> None:
    status, found = await run_doctor("demo", *LOCAL, "--registry", node.nodes[0].pinned)
    assert {found[check]["verdict"] for check in MUST_BE_WELL} == {"ok"}, found
    assert status == 0
    assert "1 nodes known, 1 online" in found["registry"]["said"]
    assert "others reach it at 127.0.0.1:" in found["reachability"]["said"]
    assert "8 of the 8 blocks of demo fit" in found["memory"]["said"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_dht_is_joined_and_an_announced_port_that_nobody_reaches_is_told(node: LocalSwarm) -> None:
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{unused.getsockname()[1]}"
        status, found = await run_doctor(
            "demo", *LOCAL, "--registry", node.nodes[0].ready["join"], "--announce", nowhere
        )
    assert status == 1
    assert "1 nodes known" in found["registry"]["said"]
    assert found["nodes"]["verdict"] == "ok"
    assert found["reachability"]["verdict"] == "fail"
    assert nowhere in found["reachability"]["said"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_taken_port_a_missing_device_and_a_registry_that_is_gone(node: LocalSwarm) -> None:
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{unused.getsockname()[1]}"
        told = ("--listen", node.nodes[0].address, "--registry", nowhere, "--device", "cuda:99")
        status, found = await run_doctor(*told)
    assert status == 1
    assert found["port"]["verdict"] == found["registry"]["verdict"] == found["device"]["verdict"] == "fail"
    assert nowhere in found["registry"]["said"]
    assert "--device cpu" in found["device"]["next"]
    assert "numerics" not in found
