"""`swarm status` reports on real nodes."""

import asyncio
import json
import sys

import pytest

from treeswarm_client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_three_nodes_cover_the_model_and_two_leave_a_gap(three_nodes: LocalSwarm) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers) as client:
        overview = await client.overview()
    assert overview.covered
    (served,) = overview.models[0].classes
    assert [node.address for node in served.nodes] == [node.address for node in three_nodes.nodes]
    assert all(node.latency_ms is not None and node.rate > 0 and node.load == 0 for node in served.nodes)
    two_peers = ",".join(node.address for node in three_nodes.nodes[:2])
    command = (
        sys.executable,
        "-m",
        "treeswarm_client.cli.main",
        "status",
        "--peers",
        two_peers,
        "--model",
        "demo",
        "--json",
    )
    status = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(status.communicate(), 60)
    assert status.returncode == 1
    assert json.loads(output)["models"][0]["gaps"] == [f"{three_nodes.nodes[2].ready['blocks']}"]
