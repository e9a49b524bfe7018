"""A failure has a plain error that names the node, keeps the text so far, and affects no other session."""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.processes.conftest import save_random_model

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import BadRequest, Mismatch, MissingBlocks, Refused, SwarmError, Unreachable
from treeswarm.protocol.messages import (
    Answers,
    Append,
    Describe,
    Description,
    Fault,
    LinkHello,
    NextHop,
    Open,
    Opened,
)
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm.transport.tls import Security
from treeswarm_bench.benchmarks.common import BenchSetup, bench_swarm
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
BIN = Path(sys.executable).parent


async def free_rows(swarm: LocalSwarm) -> list[int]:
    async with SwarmClient(model="demo", peers=swarm.peers, tree_size=0) as client:
        return [node.trunk_free for node in (await client.describe_nodes()).values()]


async def wait_for_free_rows(swarm: LocalSwarm, expected: list[int]) -> bool:
    for _ in range(100):
        if await free_rows(swarm) == expected:
            return True
        await asyncio.sleep(0.1)
    return False


# ---------------------------------------------------------------- deaths


async def test_lost_tail_is_named_and_the_text_so_far_kept() -> None:
    async with local_swarm("demo", even_cuts(8, 3), emulate_link="delay=10ms") as swarm:
        tail = swarm.nodes[-1]
        async with SwarmClient(model="demo", peers=swarm.peers, draft="demo-draft", patience=2.0) as client:
            whole = await client.generate("def f(", max_new_tokens=200, ignore_eos=True)
            run = client.stream("def f(", max_new_tokens=200, ignore_eos=True)
            with pytest.raises(MissingBlocks, match=f"blocks 5:8.*{tail.address}"):
                async for _ in run:
                    if len(run.token_ids) == 20:
                        tail.process.kill()
            assert run.token_ids == whole.token_ids[: len(run.token_ids)]
            assert len(run.token_ids) >= 20
            assert run.text == whole.text[: len(run.text)]
            assert run.text
            client.patience = 0.0
            with pytest.raises(MissingBlocks, match="blocks 5:8"):
                await client.generate("def f(", max_new_tokens=4)


async def test_bench_with_a_killed_node_fails() -> None:
    with pytest.raises(SwarmError):
        async with bench_swarm(BenchSetup(tokens=8)) as bench:
            await bench.run([5, 6, 7], tree_size=4)
            bench.swarm.nodes[-1].process.kill()
            await bench.swarm.nodes[-1].process.wait()
            await bench.provenance()


async def test_ctrl_c_ends_the_client_cleanly_and_frees_the_session(three_nodes: LocalSwarm) -> None:
    before = await free_rows(three_nodes)
    command = [BIN / "swarm", "generate", "x = ", "--model", "demo", "--peers", three_nodes.peers, "--tree-size", "0"]
    process = await asyncio.create_subprocess_exec(
        *command, "--max-new-tokens", "1900", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert await wait_for_free_rows(three_nodes, before)


async def test_sigterm_ends_a_node_after_its_grace_and_client_is_told() -> None:
    """No other node can take its place, so that the client stays for the whole grace period."""
    async with local_swarm("demo", [Span(0, 8)], flags=("--grace", "1")) as swarm:
        node = swarm.nodes[0]
        async with SwarmClient(model="demo", peers=swarm.peers, tree_size=0, patience=0.0) as client:
            run = client.stream("x", max_new_tokens=1900, ignore_eos=True)
            # The end of the stream may overtake the last message on it.
            with pytest.raises(MissingBlocks, match=rf"blocks 0:8.*{node.address}"):
                async for token in run:
                    if token.traversal == 3:
                        node.process.terminate()
            assert len(run.token_ids) > 3
        assert await asyncio.wait_for(node.process.wait(), 120) == 0
        assert b"Traceback" not in await node.errors


# ---------------------------------------------------------------- bad input to the client


async def test_peers_that_do_not_cover_the_model_are_refused(three_nodes: LocalSwarm) -> None:
    head, _, tail = (node.address for node in three_nodes.nodes)
    with pytest.raises(MissingBlocks, match=r"blocks 3:5 of 8"):
        async with SwarmClient(model="demo", peers=f"{head},{tail}", patience=1.0):
            pass
    with pytest.raises(Unreachable):
        async with SwarmClient(model="demo", peers="127.0.0.1:9", patience=1.0):
            pass


async def test_peers_that_would_compute_other_text_are_refused(tmp_path: Path, random_model: Path) -> None:
    other = save_random_model(tmp_path, layers=5, seed=99)
    cases: list[tuple[Any, str]] = [
        ((str(other), "float32"), "weights differ"),
        ((str(random_model), "bfloat16"), "bfloat16 and float32|float32 and bfloat16"),
    ]
    async with local_swarm(str(random_model), [Span(0, 2)]) as head:
        for (model, dtype), words in cases:
            async with local_swarm(model, [Span(2, 5)], dtype=dtype) as tail:
                with pytest.raises(Mismatch, match=words):
                    async with SwarmClient(model=str(random_model), peers=f"{head.peers},{tail.peers}"):
                        pass
        with pytest.raises(Mismatch, match="another config"):
            async with SwarmClient(model="demo", peers=head.peers):
                pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x " * 3000}, "context is 2048"),
        ({"prompt": "x", "max_new_tokens": 2048}, "context is 2048"),
        ({"prompt": "x", "max_new_tokens": 0}, "at least 1"),
        ({"prompt": [4096]}, "outside the vocabulary"),
        ({"prompt": "x", "temperature": -1.0}, "temperature"),
        ({"prompt": "x", "top_p": 0.0}, "top_p"),
        ({"prompt": "x", "seed": -1}, "seed"),
    ],
    ids=range(8),
)
async def test_impossible_requests_are_refused(three_nodes: LocalSwarm, options: dict[str, Any], words: str) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers) as client:
        with pytest.raises(BadRequest, match=words):
            await client.generate(**options)


async def test_full_node_is_waited_for_with_patience_else_reported() -> None:
    async with local_swarm("demo", [Span(0, 8)]) as swarm:
        free = await free_rows(swarm)
        clients = [SwarmClient(model="demo", peers=swarm.peers, tree_size=0, patience=1.0) for _ in range(9)]
        runs = []
        for client in clients:
            await client.__aenter__()
            runs.append(client.stream("x", max_new_tokens=2000, ignore_eos=True))
        firsts = await asyncio.gather(*(anext(aiter(run)) for run in runs), return_exceptions=True)
        refused = [first for first in firsts if isinstance(first, BaseException)]
        assert 0 < len(refused) < len(clients)
        for error in refused:
            assert isinstance(error, Refused)
            assert error.code == "full"
            assert "every node that serves blocks 0:8 is full: wait with --patience" in str(error)
        async with SwarmClient(model="demo", peers=swarm.peers, tree_size=0, patience=60.0) as patient:
            waiting = asyncio.create_task(patient.generate([7] * 1990, max_new_tokens=4, ignore_eos=True))
            await asyncio.sleep(1.0)
            for client in clients:
                await client.__aexit__(None, None, None)
            assert len((await waiting).token_ids) == 4
        assert await wait_for_free_rows(swarm, free)


# ---------------------------------------------------------------- bad input to the programs


async def test_port_in_use_is_reported(three_nodes: LocalSwarm) -> None:
    command = [BIN / "swarm-node", "demo", "--blocks", "0:1", "--listen", three_nodes.nodes[0].address]
    result = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "in use" in result.stderr


async def test_generate_prints_json(three_nodes: LocalSwarm) -> None:
    command = [BIN / "swarm", "generate", "import os\n", "--model", "demo", "--peers", three_nodes.peers]
    options = ["--draft", "demo-draft", "--tree-size", "16", "--max-new-tokens", "20", "--json"]
    result = await asyncio.to_thread(subprocess.run, [*command, *options], capture_output=True, text=True, check=True)
    output = json.loads(result.stdout)
    keys = {"text", "token_ids", "finish_reason", "prefix_tokens", "stats", "route", "rounds", "numerics", "draft"}
    assert set(output) == keys | {"drivers"}
    assert len(output["token_ids"]) == output["stats"]["committed"] <= 20
    assert {"traversals", "tokens_per_traversal", "acceptance", "seconds", "tokens_per_second", "time"} <= set(
        output["stats"]
    )
    assert set(output["stats"]["time"]) == {"draft", "wire", "queue", "compute"}


# ---------------------------------------------------------------- hostile peers

SESSION, TICKET = b"S" * 16, b"T" * 16


def frame(seq: int, first_id: int, parents: list[int], **changes: Any) -> Append:
    rows = len(parents)
    append = Append(
        epoch=0,
        seq=seq,
        commit=np.empty(0, np.uint32),
        first_id=first_id,
        parents=np.array(parents, np.uint32),
        tokens=np.ones(rows, np.uint32),
        prefill=False,
        answers=Answers.ALL,
        settings=SamplingSettings(),
        skipped=np.zeros(rows, np.bool_),
        hidden=np.zeros((rows, 256), np.float32).tobytes(),
    )
    return dataclasses.replace(append, **changes)


async def open_session(transport: GrpcTransport, swarm: LocalSwarm) -> tuple[Stream, str]:
    """Open a session on the middle node, to be fed by the test; return its control stream and id."""
    address = swarm.nodes[1].address
    control = await transport.connect(address, StreamKind.CONTROL)
    await control.send(Describe(PROTOCOL_VERSION))
    described = await control.receive()
    assert isinstance(described, Description)
    hop = NextHop(swarm.nodes[2].address, TICKET)
    session = os.urandom(16)
    await control.send(Open(PROTOCOL_VERSION, session, 0, described.span, described.numerics, 100, 8, TICKET, hop))
    assert isinstance(await control.receive(), Opened)
    return control, session.hex()


NAN = np.full((1, 256), np.nan, np.float32).tobytes()


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (frame(0, 1, [0], hidden=b"1234"), "malformed"),
        (frame(0, 1, [0], hidden=NAN), "not-finite"),
        (frame(0, 1, [7]), "bad-tree"),
        (frame(0, 0, [0]), "bad-tree"),
        (frame(0, 1, [0] * 9), "out-of-room"),
        (frame(0, 1, list(range(101)), prefill=True), "out-of-room"),
        (frame(0, 1, [0], tokens=np.array([99_999], np.uint32)), "malformed"),
        (frame(0, 1, [0], epoch=5), "malformed"),
        (frame(500, 1, [0]), "malformed"),
        (frame(0, 1, [0], commit=np.array([3], np.uint32)), "bad-tree"),
    ],
    ids=["shape", "nan", "parent", "id", "crown", "trunk", "token", "epoch", "gap", "commit"],
)
async def test_hostile_frame_ends_its_session_only(three_nodes: LocalSwarm, bad: Append, code: str) -> None:
    before = await free_rows(three_nodes)
    transport = GrpcTransport(security=Security())
    control, session = await open_session(transport, three_nodes)
    link = await transport.connect(three_nodes.nodes[1].address, StreamKind.LINK)
    await link.send(LinkHello(PROTOCOL_VERSION, bytes.fromhex(session), 0, TICKET))
    await link.send(bad)
    fault = await asyncio.wait_for(control.receive(), 30)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.fatal) == (code, True)
    await transport.close()
    assert await wait_for_free_rows(three_nodes, before)
    async with SwarmClient(model="demo", peers=three_nodes.peers, tree_size=0) as client:
        assert len((await client.generate("x", max_new_tokens=3, ignore_eos=True)).token_ids) == 3


async def test_replayed_frame_is_reported_and_ignored(three_nodes: LocalSwarm) -> None:
    transport = GrpcTransport(security=Security())
    control, session = await open_session(transport, three_nodes)
    link = await transport.connect(three_nodes.nodes[1].address, StreamKind.LINK)
    await link.send(LinkHello(PROTOCOL_VERSION, bytes.fromhex(session), 0, TICKET))
    quiet = frame(0, 1, [0], answers=Answers.NONE, prefill=True)
    await link.send(quiet)
    await link.send(quiet)
    faults = []
    while len(faults) < 1 or faults[-1].code != "replayed":
        fault = await asyncio.wait_for(control.receive(), 30)
        assert isinstance(fault, Fault)
        faults.append(fault)
        if fault.fatal:
            break
    assert any(f.code == "replayed" and not f.fatal for f in faults)
    await transport.close()


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        (LinkHello(PROTOCOL_VERSION, b"?" * 16, 0, TICKET), "unknown-session"),
        (LinkHello(PROTOCOL_VERSION, SESSION, 0, b"!" * 16), "wrong-ticket"),
        (LinkHello(99, SESSION, 0, TICKET), "wrong-version"),
        (frame(0, 1, [0]), "malformed"),
    ],
    ids=["session", "ticket", "version", "no hello"],
)
async def test_link_without_a_valid_hello_is_refused(three_nodes: LocalSwarm, hello: Any, code: str) -> None:
    transport = GrpcTransport(security=Security())
    _, session = await open_session(transport, three_nodes)
    if isinstance(hello, LinkHello) and hello.session == SESSION:
        hello = dataclasses.replace(hello, session=bytes.fromhex(session))
    link = await transport.connect(three_nodes.nodes[1].address, StreamKind.LINK)
    await link.send(hello)
    with pytest.raises(Refused) as refused:
        await asyncio.wait_for(link.receive(), 30)
    assert refused.value.code == code
    await transport.close()
