"""`swarm status` shows nodes that send records and answer pings."""

import asyncio
import contextlib
import io
import json
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from treeswarm.errors import Unreachable
from treeswarm.identity import config_digest
from treeswarm.keys import Identity
from treeswarm.model_files import read_config, resolve_model
from treeswarm.protocol.messages import Ping, Pong, Records, Watch
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm.registry import client_registry
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Listener, Stream, StreamKind, Transport
from treeswarm.transport.tls import Security
from treeswarm_bench.benchmarks.parts.fake_node import FakeNode
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client import swarm_overview
from treeswarm_client.cli.main import main, make_parser
from treeswarm_client.cli.status import run_status, shown_registry
from treeswarm_client.discovery import prober


@dataclass(eq=False)
class AnsweringNode:
    """A node without a model, which sends records and answers pings after a while."""

    transport: Transport
    span: Span
    answers_s: float | None = 0.05
    """Seconds until a ping is answered, or None if none is."""
    changes: dict[str, Any] = field(default_factory=dict)
    others: list[bytes] = field(default_factory=list)
    """Sealed records that are sent to clients who ask for everyone's."""
    pings: int = 0
    """Number of pings received."""
    _key: FakeNode = field(default_factory=FakeNode)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, address: str = "127.0.0.1:0") -> str:
        self.listener: Listener = await self.transport.listen(address, self._accept)
        self.change()
        return self.address

    @property
    def address(self) -> str:
        return self.listener.address

    def change(self, **changes: Any) -> None:
        self.changes |= changes
        pinless: dict[str, Any] = {"pin": "", "address": self.address, "span": self.span}
        self.sealed = self._key.record(**pinless | self.changes).sealed
        self._changed.set()

    async def _accept(self, kind: StreamKind, stream: Stream) -> None:
        sending: list[asyncio.Task[None]] = []
        try:
            while (message := await stream.receive()) is not None:
                if isinstance(message, Watch):
                    sending.append(asyncio.create_task(self._send_records(stream, everyone=message.everyone)))
                elif isinstance(message, Ping) and self.answers_s is not None:
                    self.pings += 1
                    await asyncio.sleep(self.answers_s)
                    await stream.send(Pong(message.stamp))
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    async def _send_records(self, stream: Stream, *, everyone: bool) -> None:
        while True:
            self._changed.clear()
            await stream.send(Records((self.sealed, *(self.others if everyone else ()))))
            await self._changed.wait()


@contextlib.asynccontextmanager
async def answering_nodes(network: MemoryNetwork, *spans: Span, **changes: Any) -> AsyncIterator[list[AnsweringNode]]:
    nodes = [AnsweringNode(network.transport(), span, changes=dict(changes)) for span in spans]
    for node in nodes:
        await node.start()
    try:
        yield nodes
    finally:
        for node in nodes:
            await node.listener.close()


def peers_of(nodes: list[AnsweringNode]) -> str:
    return ",".join(node.address for node in nodes)


@dataclass(eq=False)
class CapturedConsole:
    """Runs the command on a console of 100 columns and keeps what it writes."""

    file: io.StringIO = field(default_factory=io.StringIO)

    async def run(self, network: MemoryNetwork, *arguments: str) -> int:
        args = make_parser().parse_args(["status", *arguments])
        transport = network.transport()
        try:
            return await run_status(args, transport, Console(file=self.file, width=100, highlight=False))
        finally:
            await transport.close()

    @property
    def text(self) -> str:
        return self.file.getvalue()


def test_complete_swarm_is_shown_with_status_0() -> None:
    async def scenario() -> None:
        network, captured = MemoryNetwork(), CapturedConsole()
        async with answering_nodes(network, Span(0, 3), Span(3, 8), Span(2, 8)) as nodes:
            assert await captured.run(network, "--peers", peers_of(nodes)) == 0
            for node in nodes:
                assert f"{node.address}" in captured.text
        assert "blocks 0:8 covered, weakest block has 1 replica" in captured.text
        assert captured.text.count(" 50.0 ") == 3  # the latency of each node, in milliseconds

    run_virtually(scenario())


def test_gap_is_named_with_status_1() -> None:
    async def scenario() -> None:
        network, captured = MemoryNetwork(), CapturedConsole()
        async with answering_nodes(network, Span(0, 3), Span(5, 8)) as nodes:
            assert await captured.run(network, "--peers", peers_of(nodes)) == 1
            shown = " ".join(captured.text.split())
            first = peers_of(nodes).split(",")[0]
            assert f"no node serves blocks 3:5: start `swarm-node demo --blocks 3:5 --registry {first}`" in shown
            nodes[1].change(state=NodeState.DRAINING, span=Span(3, 8))
            assert await captured.run(network, "--peers", peers_of(nodes)) == 1
            assert "no node serves blocks 3:8" in captured.text
            assert "draining" in captured.text

    run_virtually(scenario())


def test_model_flag_shows_one_model_of_several() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        digest = config_digest(read_config(resolve_model("demo")))
        async with (
            answering_nodes(network, Span(0, 8), model=digest) as ours,
            answering_nodes(network, Span(0, 3)) as theirs,
        ):
            assert await CapturedConsole().run(network, "--peers", peers_of(ours + theirs)) == 1
            captured = CapturedConsole()
            assert await captured.run(network, "--peers", peers_of(ours + theirs), "--model", "demo", "--json") == 0
            result = json.loads(captured.text)
            assert result["refused"] == {"other-model": 1}
            (model,) = result["models"]
            assert (model["model"], model["covered"]) == (digest, True)
            captured = CapturedConsole()
            assert await captured.run(network, "--registry", peers_of(theirs), "--model", "demo") == 1
            assert "no node serves blocks 0:8" in captured.text

    run_virtually(scenario())


def test_silent_nodes_serve_no_blocks() -> None:
    async def scenario() -> None:
        network, captured = MemoryNetwork(), CapturedConsole()
        async with answering_nodes(network, Span(0, 5), Span(5, 8), Span(5, 8)) as nodes:
            nodes[1].answers_s = None
            network.disconnect_host(nodes[2].address)
            nodes[0].others = [node.sealed for node in nodes[1:]] + [nodes[1].sealed[:-1] + b"x", b"nothing"]
            assert await captured.run(network, "--registry", nodes[0].address, "--json") == 1
        result = json.loads(captured.text)
        (served,) = result["models"][0]["classes"]
        assert served["gaps"] == ["5:8"]
        assert served["nodes"][0]["latency_ms"] == 50.0
        assert {node["why_silent"] for node in served["nodes"]} == {
            None,
            "no answer within 8 s",
            f"no answer from {nodes[2].address}: check the address and that the node runs",
        }
        assert result["refused"]["forged"] == 1
        assert result["refused"]["malformed"] == 1

    run_virtually(scenario())


def test_peer_without_records_is_named() -> None:
    async def scenario() -> None:
        network, captured = MemoryNetwork(), CapturedConsole()
        async with answering_nodes(network, Span(0, 8)) as nodes:
            assert await captured.run(network, "--peers", f"{peers_of(nodes)},10.9.9.9:1") == 0
        assert "10.9.9.9:1 sends no records: no answer from 10.9.9.9:1" in captured.text

    run_virtually(scenario())


def test_pings_are_limited_in_number_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(prober, "AT_ONCE", 4)
        network = MemoryNetwork()
        async with answering_nodes(network, *[Span(0, 8)] * 9) as nodes:
            for node in nodes:
                node.answers_s = None
            addresses = {node.address: node.address for node in nodes}
            start = asyncio.get_running_loop().time()
            probing = asyncio.create_task(prober.probe_all(network.transport(), addresses))
            await asyncio.sleep(1)
            assert len(network.streams) == 2 * 4  # each stream has two ends
            probes = await probing
            # Two batches fit into the time; the ninth node was still being pinged and has no result.
            assert asyncio.get_running_loop().time() - start == prober.TOGETHER_S
            assert len(probes) == 8

    run_virtually(scenario())


def test_overview_is_available_from_python() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        async with answering_nodes(network, Span(0, 3), Span(3, 8)) as nodes:
            transport = network.transport()
            registry = await client_registry(f"static:{peers_of(nodes)}", None, transport)
            overview = await swarm_overview(registry, transport)
            await registry.close()
            await transport.close()
        assert overview.covered
        assert [node.address for node in overview.models[0].classes[0].nodes] == [node.address for node in nodes]

    run_virtually(scenario())


def test_watch_prints_changes_only() -> None:
    async def scenario() -> None:
        network, captured = MemoryNetwork(), CapturedConsole()
        async with answering_nodes(network, Span(0, 3), Span(3, 8)) as nodes:
            watching = asyncio.create_task(captured.run(network, "--peers", peers_of(nodes), "--watch", "--json"))
            await asyncio.sleep(60)
            assert len(captured.text.splitlines()) == 1
            assert nodes[0].pings <= 3 * (60 / prober.PROBE_AGAIN_S + 1)
            nodes[1].change(state=NodeState.PAUSED)
            await asyncio.sleep(3)
            nodes[0].answers_s = None  # it hangs, which no registry reports
            await asyncio.sleep(3 * prober.PROBE_AGAIN_S)
            await cancelled(watching)
        result = [json.loads(line) for line in captured.text.splitlines()]
        assert [line["models"][0]["gaps"] for line in result] == [[], ["3:8"], ["0:8"]]

    run_virtually(scenario())


@pytest.mark.parametrize("terminal", [False, True])
def test_watch_works_on_a_terminal_and_into_a_file(terminal: bool) -> None:
    async def scenario() -> None:
        network, file = MemoryNetwork(), io.StringIO()
        async with answering_nodes(network, Span(0, 8)) as nodes:
            args = make_parser().parse_args(["status", "--peers", peers_of(nodes), "--watch"])
            console = Console(file=file, width=100, height=30, force_terminal=terminal, highlight=False)
            transport = network.transport()
            watching = asyncio.create_task(run_status(args, transport, console))
            await asyncio.sleep(5)
            nodes[0].change(state=NodeState.PAUSED)
            await asyncio.sleep(5)
            await cancelled(watching)
            await transport.close()
        first, second = (file.getvalue().index(words) for words in ("blocks 0:8 covered", "no node serves blocks 0:8"))
        assert first < second

    run_virtually(scenario())


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_no_answer_raises_unreachable() -> None:
    async def scenario() -> None:
        with pytest.raises(Unreachable, match=r"10\.9\.9\.9:1"):
            await CapturedConsole().run(MemoryNetwork(), "--peers", "10.9.9.9:1")

    run_virtually(scenario())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--registry", "dht:"], "the join code or HOST:PORT"),
        (["--peers", "nowhere"], "HOST:PORT"),
        (["--peers", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--peers", "127.0.0.1:1", "--model", "./no-such-model"], "no model"),
        (["--peers", "127.0.0.1:1", "--swarm-key", "./no-such-key"], "openssl rand -hex 32"),
    ],
    ids=range(5),
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("swarm: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


async def test_program_over_grpc_watches_until_ctrl_c() -> None:
    transport = GrpcTransport(security=Security(Identity.ephemeral()))
    node = AnsweringNode(transport, Span(0, 8), answers_s=0.0)
    await node.start()
    command = (sys.executable, "-m", "treeswarm_client.cli.main", "status", "--peers", node.address)
    try:
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        assert "blocks 0:8 covered" in output.decode()
        watching = await asyncio.create_subprocess_exec(
            *command, "--watch", "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert watching.stdout is not None
        assert json.loads(await asyncio.wait_for(watching.stdout.readline(), 60))["covered"] is True
        watching.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(watching.communicate(), 60)
        assert watching.returncode == 130
        assert b"Traceback" not in errors
    finally:
        await node.listener.close()
        await transport.close()


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("10.0.0.1:4001,10.0.0.2:4001", "10.0.0.1:4001"),
        ("static:10.0.0.1:4001,10.0.0.2:4001", "10.0.0.1:4001"),
        ("mqtts://ada:secret@broker.example.org/ours", "mqtts://USER:PASSWORD@broker.example.org/ours"),
        ("dht:", "dht:"),
    ],
)
def test_a_hint_names_the_registry_without_its_password(spec: str, shown: str) -> None:
    assert shown_registry(spec) == shown
