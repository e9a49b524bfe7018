"""`swarm status` against nodes that tell records and answer pings."""

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
from tests.support.registry_media import FakeNode

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
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client import swarm_overview
from treeswarm_client.cli.main import main, make_parser
from treeswarm_client.cli.status import status
from treeswarm_client.discovery import prober


@dataclass(eq=False)
class Teller:
    """A node of the seam alone: tells records, answers pings after a while."""

    transport: Transport
    span: Span
    answers_s: float | None = 0.05
    """None: never."""
    changes: dict[str, Any] = field(default_factory=dict)
    others: list[bytes] = field(default_factory=list)
    """Told to those who ask for everyone's."""
    pinged: int = 0
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
        telling: list[asyncio.Task[None]] = []
        try:
            while (message := await stream.receive()) is not None:
                if isinstance(message, Watch):
                    telling.append(asyncio.create_task(self._tell(stream, everyone=message.everyone)))
                elif isinstance(message, Ping) and self.answers_s is not None:
                    self.pinged += 1
                    await asyncio.sleep(self.answers_s)
                    await stream.send(Pong(message.stamp))
        finally:
            for task in telling:
                task.cancel()
            await asyncio.gather(*telling, return_exceptions=True)

    async def _tell(self, stream: Stream, *, everyone: bool) -> None:
        while True:
            self._changed.clear()
            await stream.send(Records((self.sealed, *(self.others if everyone else ()))))
            await self._changed.wait()


@contextlib.asynccontextmanager
async def tellers(network: MemoryNetwork, *spans: Span, **changes: Any) -> AsyncIterator[list[Teller]]:
    made = [Teller(network.transport(), span, changes=dict(changes)) for span in spans]
    for teller in made:
        await teller.start()
    try:
        yield made
    finally:
        for teller in made:
            await teller.listener.close()


def peers(made: list[Teller]) -> str:
    return ",".join(teller.address for teller in made)


@dataclass(eq=False)
class Said:
    """A console of a given width, and what was written on it."""

    file: io.StringIO = field(default_factory=io.StringIO)

    async def run(self, network: MemoryNetwork, *arguments: str) -> int:
        args = make_parser().parse_args(["status", *arguments])
        transport = network.transport()
        try:
            return await status(args, transport, Console(file=self.file, width=100, highlight=False))
        finally:
            await transport.close()

    @property
    def text(self) -> str:
        return self.file.getvalue()


def test_a_whole_swarm_is_shown_and_is_a_success() -> None:
    async def scenario() -> None:
        network, said = MemoryNetwork(), Said()
        async with tellers(network, Span(0, 3), Span(3, 8), Span(2, 8)) as made:
            assert await said.run(network, "--peers", peers(made)) == 0
            for teller in made:
                assert f"{teller.address}" in said.text
        assert "blocks 0:8 covered, weakest block has 1 replica" in said.text
        assert said.text.count(" 50.0 ") == 3  # milliseconds, each measured

    run_virtually(scenario())


def test_a_gap_is_named_and_is_a_failure() -> None:
    async def scenario() -> None:
        network, said = MemoryNetwork(), Said()
        async with tellers(network, Span(0, 3), Span(5, 8)) as made:
            assert await said.run(network, "--peers", peers(made)) == 1
            assert "no node serves blocks 3:5: start `swarm-node demo --blocks 3:5 --registry …`" in said.text
            made[1].change(state=NodeState.DRAINING, span=Span(3, 8))
            assert await said.run(network, "--peers", peers(made)) == 1
            assert "no node serves blocks 3:8" in said.text
            assert "draining" in said.text

    run_virtually(scenario())


def test_one_model_of_several() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        digest = config_digest(read_config(resolve_model("demo")))
        async with tellers(network, Span(0, 8), model=digest) as ours, tellers(network, Span(0, 3)) as theirs:
            assert await Said().run(network, "--peers", peers(ours + theirs)) == 1
            said = Said()
            assert await said.run(network, "--peers", peers(ours + theirs), "--model", "demo", "--json") == 0
            told = json.loads(said.text)
            assert told["refused"] == {"other-model": 1}
            (model,) = told["models"]
            assert (model["model"], model["covered"]) == (digest, True)
            said = Said()
            assert await said.run(network, "--registry", peers(theirs), "--model", "demo") == 1
            assert "no node serves blocks 0:8" in said.text

    run_virtually(scenario())


def test_who_does_not_answer_serves_nobody() -> None:
    async def scenario() -> None:
        network, said = MemoryNetwork(), Said()
        async with tellers(network, Span(0, 5), Span(5, 8), Span(5, 8)) as made:
            made[1].answers_s = None
            network.disconnect_host(made[2].address)
            made[0].others = [teller.sealed for teller in made[1:]] + [made[1].sealed[:-1] + b"x", b"nothing"]
            assert await said.run(network, "--registry", made[0].address, "--json") == 1
        told = json.loads(said.text)
        (served,) = told["models"][0]["classes"]
        assert served["gaps"] == ["5:8"]
        assert served["nodes"][0]["latency_ms"] == 50.0
        assert {node["why_silent"] for node in served["nodes"]} == {
            None,
            "no answer within 8 s",
            f"no answer from {made[2].address}: check the address and that the node runs",
        }
        assert told["refused"]["forged"] == 1
        assert told["refused"]["malformed"] == 1

    run_virtually(scenario())


def test_an_address_in_the_list_that_tells_nothing_is_told() -> None:
    async def scenario() -> None:
        network, said = MemoryNetwork(), Said()
        async with tellers(network, Span(0, 8)) as made:
            assert await said.run(network, "--peers", f"{peers(made)},10.9.9.9:1") == 0
        assert "10.9.9.9:1 tells nothing: no answer from 10.9.9.9:1" in said.text

    run_virtually(scenario())


def test_pings_go_out_some_at_once_and_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(prober, "AT_ONCE", 4)
        network = MemoryNetwork()
        async with tellers(network, *[Span(0, 8)] * 9) as made:
            for teller in made:
                teller.answers_s = None
            addresses = {teller.address: teller.address for teller in made}
            start = asyncio.get_running_loop().time()
            asked = asyncio.create_task(prober.probe_all(network.transport(), addresses))
            await asyncio.sleep(1)
            assert len(network.streams) == 2 * 4  # two ends each
            probes = await asked
            # Two turns fit; the ninth node was still being asked: nothing is known of it.
            assert asyncio.get_running_loop().time() - start == prober.TOGETHER_S
            assert len(probes) == 8

    run_virtually(scenario())


def test_from_python() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        async with tellers(network, Span(0, 3), Span(3, 8)) as made:
            transport = network.transport()
            registry = await client_registry(f"static:{peers(made)}", None, transport)
            overview = await swarm_overview(registry, transport)
            await registry.close()
            await transport.close()
        assert overview.covered
        assert [node.address for node in overview.models[0].classes[0].nodes] == [teller.address for teller in made]

    run_virtually(scenario())


def test_watching_tells_changes_and_nothing_else() -> None:
    async def scenario() -> None:
        network, said = MemoryNetwork(), Said()
        async with tellers(network, Span(0, 3), Span(3, 8)) as made:
            watching = asyncio.create_task(said.run(network, "--peers", peers(made), "--watch", "--json"))
            await asyncio.sleep(60)
            assert len(said.text.splitlines()) == 1
            assert made[0].pinged <= 3 * (60 / prober.PROBE_AGAIN_S + 1)
            made[1].change(state=NodeState.PAUSED)
            await asyncio.sleep(3)
            made[0].answers_s = None  # it hangs: no registry tells that
            await asyncio.sleep(3 * prober.PROBE_AGAIN_S)
            await cancelled(watching)
        told = [json.loads(line) for line in said.text.splitlines()]
        assert [line["models"][0]["gaps"] for line in told] == [[], ["3:8"], ["0:8"]]

    run_virtually(scenario())


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_on_a_terminal_and_into_a_file(terminal: bool) -> None:
    async def scenario() -> None:
        network, file = MemoryNetwork(), io.StringIO()
        async with tellers(network, Span(0, 8)) as made:
            args = make_parser().parse_args(["status", "--peers", peers(made), "--watch"])
            console = Console(file=file, width=100, height=30, force_terminal=terminal, highlight=False)
            transport = network.transport()
            watching = asyncio.create_task(status(args, transport, console))
            await asyncio.sleep(5)
            made[0].change(state=NodeState.PAUSED)
            await asyncio.sleep(5)
            await cancelled(watching)
            await transport.close()
        first, second = (file.getvalue().index(words) for words in ("blocks 0:8 covered", "no node serves blocks 0:8"))
        assert first < second

    run_virtually(scenario())


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_nobody_there_is_an_error_of_the_tree() -> None:
    async def scenario() -> None:
        with pytest.raises(Unreachable, match=r"10\.9\.9\.9:1"):
            await Said().run(MemoryNetwork(), "--peers", "10.9.9.9:1")

    run_virtually(scenario())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--registry", "dht:"], "--peers HOST:PORT"),
        (["--peers", "nowhere"], "HOST:PORT"),
        (["--peers", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--peers", "127.0.0.1:1", "--model", "./no-such-model"], "no model"),
        (["--peers", "127.0.0.1:1", "--swarm-key", "./no-such-key"], "openssl rand -hex 32"),
    ],
    ids=range(5),
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("swarm: ")
    assert said.err.count("\n") == 1
    assert words in said.err


async def test_the_program_over_grpc_until_ctrl_c() -> None:
    transport = GrpcTransport(security=Security(Identity.ephemeral()))
    teller = Teller(transport, Span(0, 8), answers_s=0.0)
    await teller.start()
    command = (sys.executable, "-m", "treeswarm_client.cli.main", "status", "--peers", teller.address)
    try:
        shown = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(shown.communicate(), 60)
        assert shown.returncode == 0
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
        await teller.listener.close()
        await transport.close()
