"""A swarm that found itself in a DHT: nodes choose their blocks, a client knows one address and finds the rest."""

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
    """One begins the swarm; two join it at the same time, and none is told which blocks.  A fourth has them all."""
    async with local_swarm("demo", [], emulate_link="delay=5ms", flags=("--grace", "5")) as swarm:
        first = await swarm.start("--num-blocks", "4", "--registry", "dht:")
        join = ("--registry", first.ready["join"])
        others = swarm.start_all([("--num-blocks", "4", *join)] * 2, [HostCommand()] * 2)
        whole = swarm.start("--blocks", "0:8", *join)
        await asyncio.gather(others, whole)
        yield swarm


def client_of(node: LocalNode, **options: Any) -> SwarmClient:
    return SwarmClient(model="demo", registry=node.pinned, tree_size=0, **options)


async def online(client: SwarmClient, count: int) -> dict[str, Span]:
    """Spans by address, once so many nodes are known."""
    async with asyncio.timeout(60):
        while True:
            known = {s.record.address: s.record.span for s in client.view.snapshot if s.record.state == "online"}
            if len(known) >= count:
                return known
            await client.view.wait_for_change(0.5)


async def test_nodes_that_join_together_cover_the_model_and_any_of_them_tells_of_all(joined: LocalSwarm) -> None:
    chosen = [Span.parse(node.ready["blocks"]) for node in joined.nodes if node.ready["blocks"] != "0:8"]
    assert [len(span) for span in chosen] == [4, 4, 4]
    assert not missing_blocks(chosen, 8)
    for node in joined.nodes:
        async with client_of(node) as client:
            assert await online(client, 4) == {n.address: Span.parse(n.ready["blocks"]) for n in joined.nodes}


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
    said, errors = await asyncio.wait_for(process.communicate(), 60)
    result, imported = (json.loads(line) for line in said.splitlines())
    assert imported == {"code": 0, "heavy": []}, errors.decode()
    assert len(result["token_ids"]) == 4


async def test_a_generation_on_the_command_line_survives_a_kill_and_says_so(joined: LocalSwarm) -> None:
    """Even of the node that it was told of."""
    named = joined.nodes[-1]
    async with client_of(joined.nodes[0]) as client:
        await online(client, 4)
        healthy = await client.generate(PROMPT, max_new_tokens=TOKENS, temperature=0.8, seed=3)
        command = ["generate", PROMPT, "--model", "demo", "--registry", named.pinned, "--tree-size", "0", "--json"]
        command += ["--temperature", "0.8", "--seed", "3", "--max-new-tokens", str(TOKENS), "--patience", "60"]
        before = {address: node.frames for address, node in (await client.describe_nodes()).items()}
        process = await asyncio.create_subprocess_exec(
            BIN / "swarm", *command, "--show-route", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        hit = await computing(client, joined, before)
        hit.process.kill()
        said, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, errors.decode()
    result = json.loads(said)
    assert result["token_ids"] == healthy.token_ids
    assert result["text"] == healthy.text
    lost = {lost["address"]: lost["why"] for repair in result["route"]["repairs"] for lost in repair["lost"]}
    assert lost.pop(hit.address)
    assert all(SILENT in why for why in lost.values()), lost  # a busy machine may stall a node
    assert all(hop["address"] != hit.address for hop in result["route"]["hops"])
    assert not missing_blocks([Span.parse(hop["blocks"]) for hop in result["route"]["hops"]], 8)


async def computing(client: SwarmClient, swarm: LocalSwarm, before: dict[str, int]) -> LocalNode:
    """A node that has computed some tokens of the one session there is; one that has all blocks if there is."""
    async with asyncio.timeout(60):
        while True:
            for address, now in (await client.describe_nodes(list(before))).items():
                if now.sessions and now.frames >= before[address] + 20:
                    bare = address.partition("#")[0]
                    return next(node for node in swarm.nodes if node.address == bare)
            await asyncio.sleep(0.02)
