"""A node that no other host can dial leases a port and serves between two reachable nodes over real TCP."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from treeswarm.errors import SwarmError
from treeswarm.protocol.address import Address
from treeswarm_bench.lab import Lab, LabLink, can_make_namespaces, wan_lab
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import READY_S, even_cuts, local_swarm

needs_namespaces = pytest.mark.skipif(can_make_namespaces() is not None, reason=str(can_make_namespaces()))
PROMPT, TOKENS = "class Queue:\n    def ", 16
PIPE = asyncio.subprocess.PIPE


@contextlib.asynccontextmanager
async def node(lab: Lab, folder: Path, host: str, blocks: str, listen: str, *peers: str) -> AsyncIterator[Any]:
    """Start a node on a host and yield a function that waits for its next public address."""
    arguments = ["demo", "--blocks", blocks, "--listen", f"{listen}:0", "--registry", "none", "--threads", "1"]
    arguments += ["--dtype", "float32"]
    command = lab.command(host, sys.executable, "-m", "tests.support.port_node", ",".join(peers) or "-", *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, "--identity", str(folder / f"{host}.pem"), "--grace", "1", stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines = process.stdout

    async def next_address() -> dict[str, str]:
        line = await asyncio.wait_for(lines.readline(), READY_S)
        if not line:
            raise SwarmError(f"the node on {host} ended: its log is above")
        return json.loads(line)  # type: ignore[no-any-return]

    try:
        yield next_address
    finally:
        process.stdin.close()
        await process.wait()


async def generate(command: list[str], peers: list[str]) -> list[int]:
    arguments = [
        "generate",
        PROMPT,
        "--model",
        "demo",
        "--max-new-tokens",
        str(TOKENS),
        "--tree-size",
        "8",
        "--draft",
        "demo-draft",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, *arguments, "--json", "--peers", ",".join(peers), stdout=PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(output)["token_ids"]  # type: ignore[no-any-return]


@needs_namespaces
async def test_hidden_node_serves_between_two_reachable_nodes(tmp_path: Path) -> None:
    async with local_swarm("demo", even_cuts(8, 1)) as local, SwarmClient(model="demo", peers=local.peers) as client:
        expected = (await client.generate(PROMPT, max_new_tokens=TOKENS)).token_ids
    async with wan_lab(["client", "first", "hidden", "last"], LabLink(delay_s=0.01)) as lab:
        reachable = {name: lab.host(name).address for name in ("first", "last")}
        async with (
            node(lab, tmp_path, "first", "0:3", reachable["first"]) as first_address,
            node(lab, tmp_path, "last", "5:8", reachable["last"]) as last_address,
        ):
            first, last = (await first_address())["address"], (await last_address())["address"]
            async with node(lab, tmp_path, "hidden", "3:5", "127.0.0.1", first, last) as hidden_address:
                public = await hidden_address()
                assert public["basis"] == "leased"
                assert Address.parse(public["address"]).host == reachable["first"]
                swarm = lab.command("client", sys.executable, "-m", "treeswarm_client.cli.main")
                assert await generate(swarm, [first, public["address"], last]) == expected
