"""A private swarm of real processes, whose nodes are reached by pin."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.swarm_keys import new_swarm_key

from treeswarm.errors import Impostor, Refused
from treeswarm.keys import read_swarm_key
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import even_cuts, local_swarm

BIN = Path(sys.executable).parent


async def test_members_generate_and_other_clients_are_refused(tmp_path: Path) -> None:
    key = tmp_path / "swarm.key"
    key.write_text(new_swarm_key())
    key.chmod(0o600)
    async with local_swarm("demo", even_cuts(8, 2), swarm_key=key) as swarm:
        peers = ",".join(node.pinned for node in swarm.nodes)
        assert [node.ready["pin"] for node in swarm.nodes] == [node.pinned.partition("#")[2] for node in swarm.nodes]
        assert len({node.ready["node"] for node in swarm.nodes}) == 2
        member = SwarmClient(model="demo", peers=peers, tree_size=0, swarm_key=read_swarm_key(key))
        async with member as client:
            assert len((await client.generate("x", max_new_tokens=3, ignore_eos=True)).token_ids) == 3
        for wrong in (None, new_swarm_key().encode()):
            with pytest.raises(Refused, match="private swarm"):
                async with SwarmClient(model="demo", peers=peers, tree_size=0, swarm_key=wrong):
                    pass
        swapped = ",".join(
            f"{node.address}#{other.ready['pin']}"
            for node, other in zip(swarm.nodes, reversed(swarm.nodes), strict=True)
        )
        with pytest.raises(Impostor, match="instead of"):
            async with SwarmClient(model="demo", peers=swapped, tree_size=0, swarm_key=read_swarm_key(key)):
                pass
        command = [BIN / "swarm", "generate", "x", "--model", "demo", "--peers", peers, "--tree-size", "0"]
        command += ["--max-new-tokens", "3", "--json", "--swarm-key", key]
        result = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
