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
from treeswarm_node.serve import serving

settle = Lifecycle.settle


async def run(peers: list[str], arguments: list[str]) -> None:
    config = read_config(arguments)

    async def lender_candidates(_: Lifecycle) -> list[str]:
        return peers

    async def settle_and_print(life: Lifecycle, place: PublicAddress) -> None:
        await settle(life, place)
        print(json.dumps({"address": f"{place.address}#{life.identity.pin}", "basis": place.basis}), flush=True)

    with (
        patch.object(Lifecycle, "lender_candidates", lender_candidates),
        patch.object(Lifecycle, "settle", settle_and_print),
    ):
        async with serving(config):
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(run([] if sys.argv[1] == "-" else sys.argv[1].split(","), sys.argv[2:]))
