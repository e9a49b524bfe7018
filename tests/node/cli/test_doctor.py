"""`swarm-node doctor` on the real machine, with real ports, nodes and registries; judging results is pure."""

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
from treeswarm_node.cli.doctor import _registry_opener, judge_reachability
from treeswarm_node.cli.machine_checks import check_attention_kernels, check_port, judge_numerics
from treeswarm_node.model.check.device_check import TOLERANCES, NumericsCheck, check_numerics
from treeswarm_node.reachability.reachability import DialResult, decide_address

HERE = "0.0.0.0:4001"
YES, NO = DialResult(True, "203.0.113.5:4001"), DialResult(False)


@pytest.mark.parametrize(
    ("announced", "results", "verdict", "message"),
    [
        (None, [YES, YES, NO], Verdict.OK, "others reach it at 203.0.113.5:4001"),
        (None, [NO, NO], Verdict.WARN, "most do not reach"),
        (None, [], Verdict.WARN, "no node could tell"),
        ("203.0.113.5:0", [YES], Verdict.OK, "203.0.113.5:4001"),
        ("203.0.113.5:4001", [NO, NO], Verdict.FAIL, "no node reaches 203.0.113.5:4001, given by --announce"),
    ],
)
def test_reachability_is_judged_by_dial_results(
    announced: str | None, results: list[DialResult], verdict: Verdict, message: str
) -> None:
    finding = judge_reachability(decide_address(announced, HERE, results), results, HERE)
    assert (finding.verdict, message in finding.message) == (verdict, True), finding
    assert bool(finding.next_step) == (verdict is not Verdict.OK)


def test_numerics_check_fails_only_for_the_class_asked_for() -> None:
    checks = [
        NumericsCheck("float32", "none", 0.0),
        NumericsCheck("float16", "none", 1.3),
        NumericsCheck("float32", "nf4", None, "no library"),
    ]
    unneeded = judge_numerics(checks, "float32", "none")
    assert unneeded.verdict is Verdict.OK
    assert "; this node does not need: " in unneeded.message
    finding = judge_numerics(checks, "float16", "none")
    assert (finding.verdict, finding.next_step) == (Verdict.FAIL, "serve in another format: --dtype float32")
    assert "; unusable here: float16 (off by 1.3)" in finding.message
    assert "nf4 weights (no library)" in finding.message
    assert "leave out --quantization" in judge_numerics(checks, "float32", "nf4").next_step
    assert not NumericsCheck("float32", "none", float("nan")).passes


async def test_without_a_model_a_broker_is_read_and_a_dht_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    models = list[str | None]()

    async def start(broker: Broker, model: str | None, node: str | None = None) -> MemoryRegistry:
        models.append(model)
        return MemoryRegistry(model)

    monkeypatch.setattr(MqttRegistry, "start", start)
    opener = _registry_opener("mqtt://broker/ns", None, MemoryNetwork().transport())
    assert not isinstance(opener, Finding)
    await opener()
    assert models == [None]
    peer = "dht:/ip4/10.0.0.1/tcp/4002/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
    finding = _registry_opener(peer, None, MemoryNetwork().transport())
    assert isinstance(finding, Finding)
    assert (finding.verdict, finding.next_step) == (Verdict.WARN, "give a MODEL to see its nodes")


def test_this_machines_cpu_computes_every_class_correctly() -> None:
    checks = check_numerics(torch.device("cpu"))
    assert [(check.dtype, check.quantization) for check in checks] == list(TOLERANCES)
    assert all(check.passes for check in checks), checks


def test_attention_check_follows_the_attention_flag() -> None:
    messages = {}
    for attention in ("auto", "flash"):
        config = read_config(["demo", "--dtype", "float32", "--attention", attention], {})
        messages[attention] = check_attention_kernels(config, torch.device("cpu")).message
    assert messages == {"auto": "plain torch", "flash": "torch-flash agrees with plain torch"}


def test_port_check_finds_taken_and_unusable_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = check_port(f"127.0.0.1:{taken.getsockname()[1]}")
    assert finding.verdict is Verdict.FAIL
    assert "is the node running already" in finding.next_step
    assert check_port("127.0.0.1:0").verdict is Verdict.OK
    assert check_port("192.0.2.1:4001").verdict is Verdict.FAIL
    assert check_port("nonsense").next_step


async def run_doctor(*arguments: str) -> tuple[int | None, dict[str, dict[str, str]]]:
    """Run the doctor; return its exit status and its findings by check."""
    command = [sys.executable, "-m", "treeswarm_node.cli.main", "doctor", *arguments, "--json"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 120)
    assert errors == b""
    report = json.loads(output)
    assert report["ok"] is (process.returncode == 0)
    assert all(finding["next"] for finding in report["findings"] if finding["verdict"] != "ok")
    return process.returncode, {finding["check"]: finding for finding in report["findings"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node() -> AsyncIterator[LocalSwarm]:
    async with local_swarm("demo", [Span(0, 1)], registry="dht:", flags=("--kv-tokens", "1024")) as swarm:
        yield swarm


# Disk, memory and open files are left out: they depend on the machine that runs the tests.
MUST_BE_OK = (
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
async def test_every_check_passes_beside_a_running_node(node: LocalSwarm) -> None:
    status, findings = await run_doctor("demo", *LOCAL, "--registry", node.nodes[0].pinned)
    assert {findings[check]["verdict"] for check in MUST_BE_OK} == {"ok"}, findings
    assert status == 0
    assert "1 nodes known, 1 online" in findings["registry"]["said"]
    assert "others reach it at 127.0.0.1:" in findings["reachability"]["said"]
    assert "8 of the 8 blocks of demo fit" in findings["memory"]["said"]


@pytest.mark.asyncio(loop_scope="module")
async def test_unreachable_announced_port_fails_in_a_dht_swarm(node: LocalSwarm) -> None:
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        unused_address = f"127.0.0.1:{unused.getsockname()[1]}"
        status, findings = await run_doctor(
            "demo", *LOCAL, "--registry", node.nodes[0].ready["join"], "--announce", unused_address
        )
    assert status == 1
    assert "1 nodes known" in findings["registry"]["said"]
    assert findings["nodes"]["verdict"] == "ok"
    assert findings["reachability"]["verdict"] == "fail"
    assert unused_address in findings["reachability"]["said"]


@pytest.mark.asyncio(loop_scope="module")
async def test_taken_port_missing_device_and_lost_registry_fail(node: LocalSwarm) -> None:
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        unused_address = f"127.0.0.1:{unused.getsockname()[1]}"
        flags = ("--listen", node.nodes[0].address, "--registry", unused_address, "--device", "cuda:99")
        status, findings = await run_doctor(*flags)
    assert status == 1
    assert findings["port"]["verdict"] == findings["registry"]["verdict"] == findings["device"]["verdict"] == "fail"
    assert unused_address in findings["registry"]["said"]
    assert "--device cpu" in findings["device"]["next"]
    assert "numerics" not in findings
