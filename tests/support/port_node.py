"""Run a swarm-node that knows other nodes without a registry: `python -m tests.support.port_node PEERS ARGUMENT…`.

PEERS are addresses separated by commas, or -; the arguments are those of swarm-node.  It prints a line of JSON for
every public address that it settles on, until standard input ends.
"""

import asyncio
import json
import sys
from unittest.mock import patch

from treeswarm_node.cli.arguments import read_config
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.reachability.reachability import PublicAddress
from treeswarm_node.serve import run_node

set_public_address = Lifecycle.set_public_address


async def run(peers: list[str], arguments: list[str]) -> None:
    config = read_config(arguments)

    async def lender_candidates(_: Lifecycle) -> list[str]:
        return peers

    async def set_and_print(lifecycle: Lifecycle, public: PublicAddress) -> None:
        await set_public_address(lifecycle, public)
        pinned = f"{public.address}#{lifecycle.record.identity.pin}"
        print(json.dumps({"address": pinned, "basis": public.basis}), flush=True)

    with (
        patch.object(Lifecycle, "lender_candidates", lender_candidates),
        patch.object(Lifecycle, "set_public_address", set_and_print),
    ):
        async with run_node(config):
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(run([] if sys.argv[1] == "-" else sys.argv[1].split(","), sys.argv[2:]))
