"""A node that is killed and started again is found where it was, and finds its swarm, whoever is left of it."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalNode, LocalSwarm, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
BIN = Path(sys.executable).parent


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """Run the first node of a swarm, which hosts one half of the model, and one that joins and hosts the other."""
    async with local_swarm("demo", [], flags=("--num-blocks", "4", "--grace", "0")) as running:
        first = await running.start("--registry", "dht:")
        await running.start("--registry", first.ready["join"])
        yield running


async def kill(node: LocalNode) -> None:
    node.process.send_signal(signal.SIGKILL)
    await node.process.wait()


async def order(action: str, identity: Path, status: int = 0) -> str:
    command = [BIN / "swarm-node", action, "--identity", identity]
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}
    process = await asyncio.create_subprocess_exec(*command, **pipes)
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == status, output
    return output.decode()


async def test_killed_first_node_returns_to_its_swarm_at_its_addresses(swarm: LocalSwarm) -> None:
    first, second = swarm.nodes
    identity = swarm.identity(0)
    while not re.search(r"/p2p/", identity.with_name(f"{identity.name}.state").read_text()):
        await asyncio.sleep(0.2)  # it has yet to write down who joined it
    await kill(first)
    assert "no node of yours runs here" in await order("pause", identity, status=1)
    again = await swarm.start("--registry", "dht:", "--identity", str(identity))
    same = ("address", "pinned", "node", "join", "blocks")
    assert {name: again.ready[name] for name in same} == {name: first.ready[name] for name in same}
    async with SwarmClient(model="demo", registry=again.pinned, tree_size=0) as client:
        text = await client.generate("x", max_new_tokens=3, ignore_eos=True)
    assert {hop.address for hop in text.chain.hops} == {again.pinned, second.pinned}
    assert "serves" in await order("resume", identity)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
async def test_only_the_owner_reads_a_node_s_files(swarm: LocalSwarm) -> None:
    identity = swarm.identity(0)
    modes = {f"{path.name}": path.stat().st_mode & 0o777 for path in identity.parent.glob(f"{identity.name}*")}
    assert modes.pop(f"{identity.name}.lock", 0) & 0o600
    assert modes == {identity.name: 0o600, f"{identity.name}.dht": 0o600, f"{identity.name}.state": 0o600}
