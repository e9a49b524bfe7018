"""A user 100 ms away from nodes that are 10 ms from one another, over real TCP: the first node drives their texts."""

import asyncio
import json
import sys
from typing import Any

import pytest

from treeswarm_bench.lab import Lab, LabLink, can_make_namespaces, wan_lab
from treeswarm_client.local_swarm import HostCommand, LocalSwarm, local_swarm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(can_make_namespaces() is not None, reason=str(can_make_namespaces())),
]
NODES = {"n1": "0:3", "n2": "3:5", "n3": "5:8"}
PROMPT = "class Queue:\n    def __init__(self"
# New nodes know their distances within a minute; a loaded machine needs longer.
PATIENCE_S = 240.0


async def start_nodes(lab: Lab, swarm: LocalSwarm) -> None:
    """Start a node per host of the lab, the first of which drives."""
    hosts = [HostCommand(tuple(lab.command(name)), f"{lab.host(name).address}:0") for name in NODES]
    first, *others = [("--blocks", span) for span in NODES.values()]
    driver = await swarm.start(*first, "--drive", "--registry", "dht:", host=hosts[0])
    await swarm.start_all([(*flags, "--registry", driver.ready["join"]) for flags in others], hosts[1:])


async def generate(lab: Lab, swarm: LocalSwarm, drive: str, *flags: str) -> dict[str, Any]:
    words = ("generate", PROMPT, "--model", "demo", "--registry", swarm.nodes[0].pinned, "--json", "--drive", drive)
    command = lab.command("user", sys.executable, "-m", "treeswarm_client.cli.main", *words, *flags)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    result: dict[str, Any] = json.loads(output)
    return result


async def test_a_far_user_gets_the_same_text_sooner_through_a_driver() -> None:
    async with wan_lab(["user", *NODES], LabLink(delay_s=0.01)) as lab, local_swarm("demo", []) as swarm:
        for name in NODES:
            await lab.shape("user", name, LabLink(delay_s=0.1))
        await start_nodes(lab, swarm)
        driver = swarm.nodes[0].address
        for size, least in (("0", 2.0), ("auto", 1.2)):
            flags = ("--tree-size", size, "--draft", "ngram", "--max-new-tokens", "24")
            alone, driven = [await generate(lab, swarm, drive, *flags) for drive in ("self", driver)]
            assert driven["token_ids"] == alone["token_ids"]
            assert driven["drivers"]["nodes"][0]["tokens"] == 24
            ratio = driven["stats"]["tokens_per_second"] / alone["stats"]["tokens_per_second"]
            print(f"tree size {size}: {ratio:.2f} times as fast ({driven['stats']}, alone {alone['stats']})")
            assert ratio > least
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE_S
        while not (chosen := await generate(lab, swarm, "auto", "--max-new-tokens", "4"))["drivers"]["nodes"]:
            assert loop.time() < until, chosen["drivers"]
            await asyncio.sleep(5.0)
        assert chosen["drivers"]["nodes"][0]["address"] == driver
