"""In a swarm with a DHT, nodes choose their blocks, and a client with one address finds all nodes."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support.replicated_swarm import SILENT

from treeswarm.protocol.spans import Span, missing_blocks
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import HostCommand, LocalNode, LocalSwarm, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
BIN = Path(sys.executable).parent
PROMPT = "x = "
TOKENS = 120


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def joined() -> AsyncIterator[LocalSwarm]:
    """Start a swarm with one node; two join at the same time and choose their blocks, and a fourth hosts all blocks."""
    async with local_swarm("demo", [], emulate_link="delay=5ms", flags=("--grace", "5")) as swarm:
        first = await swarm.start("--num-blocks", "4", "--registry", "dht:")
        join = ("--registry", first.ready["join"])
        others = swarm.start_all([("--num-blocks", "4", *join)] * 2, [HostCommand()] * 2)
        whole = swarm.start("--blocks", "0:8", *join)
        await asyncio.gather(others, whole)
        yield swarm


def client_of(node: LocalNode, **options: Any) -> SwarmClient:
    return SwarmClient(model="demo", registry=node.pinned, tree_size=0, **options)


async def wait_for_online(client: SwarmClient, count: int) -> dict[str, Span]:
    """Wait until the client knows `count` online nodes, and return their spans by address."""
    async with asyncio.timeout(60):
        while True:
            spans = {s.record.address: s.record.span for s in client.view.snapshot if s.record.state == "online"}
            if len(spans) >= count:
                return spans
            await client.view.wait_for_change(0.5)


async def test_nodes_that_join_together_cover_the_model(joined: LocalSwarm) -> None:
    chosen = [Span.parse(node.ready["blocks"]) for node in joined.nodes if node.ready["blocks"] != "0:8"]
    assert [len(span) for span in chosen] == [4, 4, 4]
    assert not missing_blocks(chosen, 8)
    for node in joined.nodes:
        async with client_of(node) as client:
            assert await wait_for_online(client, 4) == {n.address: Span.parse(n.ready["blocks"]) for n in joined.nodes}


async def test_a_client_needs_neither_torch_nor_hivemind(joined: LocalSwarm) -> None:
    program = f"""
import asyncio, json, sys
from treeswarm_client.cli.main import main
code = main(["generate", "x = ", "--model", "demo", "--registry", {joined.nodes[1].pinned!r}, "--tree-size", "0",
             "--max-new-tokens", "4", "--json"])
print(json.dumps({{"code": code, "heavy": sorted({{"torch", "hivemind", "transformers"}} & set(sys.modules))}}))
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    result, imported = (json.loads(line) for line in output.splitlines())
    assert imported == {"code": 0, "heavy": []}, errors.decode()
    assert len(result["token_ids"]) == 4


async def test_generate_command_survives_and_reports_a_killed_node(joined: LocalSwarm) -> None:
    """The killed node may be the one whose address the command was given."""
    given = joined.nodes[-1]
    async with client_of(joined.nodes[0]) as client:
        await wait_for_online(client, 4)
        healthy = await client.generate(PROMPT, max_new_tokens=TOKENS, temperature=0.8, seed=3)
        command = ["generate", PROMPT, "--model", "demo", "--registry", given.pinned, "--tree-size", "0", "--json"]
        command += ["--temperature", "0.8", "--seed", "3", "--max-new-tokens", str(TOKENS), "--patience", "60"]
        before = {address: node.frames for address, node in (await client.describe_nodes()).items()}
        process = await asyncio.create_subprocess_exec(
            BIN / "swarm", *command, "--show-route", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        target = await find_computing_node(client, joined, before)
        target.process.kill()
        output, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, errors.decode()
    result = json.loads(output)
    assert result["token_ids"] == healthy.token_ids
    assert result["text"] == healthy.text
    lost = {hop["address"]: hop["why"] for repair in result["route"]["repairs"] for hop in repair["lost"]}
    assert lost.pop(target.address)
    assert all(SILENT in reason for reason in lost.values()), lost  # a busy machine may stall a node
    assert all(hop["address"] != target.address for hop in result["route"]["hops"])
    assert not missing_blocks([Span.parse(hop["blocks"]) for hop in result["route"]["hops"]], 8)


async def find_computing_node(client: SwarmClient, swarm: LocalSwarm, before: dict[str, int]) -> LocalNode:
    """Return a node that has computed at least 20 appends of the only session."""
    async with asyncio.timeout(60):
        while True:
            for address, now in (await client.describe_nodes(list(before))).items():
                if now.sessions and now.frames >= before[address] + 20:
                    bare = address.partition("#")[0]
                    return next(node for node in swarm.nodes if node.address == bare)
            await asyncio.sleep(0.02)
