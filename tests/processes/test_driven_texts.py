"""A node that drives texts is killed in mid-text: the client goes on, and the text is the same."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm, local_swarm

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
PROMPT = "class Queue:\n    def __init__(self"
TOKENS = 120
SAMPLING = {"temperature": 0.8, "seed": 3, "max_new_tokens": TOKENS, "ignore_eos": True}


async def start_nodes(swarm: LocalSwarm) -> None:
    """Start a driver with the first blocks, a node with the others, and a spare with all of them."""
    first = await swarm.start("--blocks", "0:4", "--drive", "--registry", "dht:")
    join = ("--registry", first.ready["join"])
    await swarm.start("--blocks", "4:8", *join)
    await swarm.start("--blocks", "0:8", *join)


async def test_a_killed_driver_leaves_the_text_unchanged() -> None:
    async with local_swarm("demo", [], emulate_link="delay=5ms") as swarm:
        await start_nodes(swarm)
        driver, _, spare = swarm.nodes
        options = {"model": "demo", "registry": spare.pinned, "draft": "none", "patience": 60.0}
        async with SwarmClient(**options, drive="self") as client:
            expected = await client.generate(PROMPT, **SAMPLING)
        async with SwarmClient(**options, drive=driver.address) as client:
            assert (await client.generate(PROMPT, **SAMPLING)).token_ids == expected.token_ids
            run = client.stream(PROMPT, **SAMPLING)
            async for _ in run:
                if len(run.token_ids) == 30:
                    driver.process.kill()
            assert run.token_ids == expected.token_ids
            assert run.text == expected.text
            (use,) = run.drivers
            assert 30 <= use.tokens < TOKENS
            assert use.ended
            assert run.chain is not None


async def test_the_command_names_the_driver() -> None:
    async with local_swarm("demo", [], emulate_link="delay=5ms") as swarm:
        await start_nodes(swarm)
        driver = swarm.nodes[0]
        command = ["generate", PROMPT, "--model", "demo", "--registry", driver.pinned, "--json"]
        command += ["--max-new-tokens", "12", "--drive", driver.ready["node"][:8]]
        process = await asyncio.create_subprocess_exec(
            BIN / "swarm", *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        output, errors = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 0, errors.decode()
        result = json.loads(output)
        assert result["route"] is None
        (use,) = result["drivers"]["nodes"]
        assert (use["address"], use["tokens"], use["ended"]) == (driver.address, 12, None)
        assert result["draft"]["name"] == "ngram"
        assert result["stats"]["committed"] == 12
