"""A swarm-node that lends ports and rents one if it must: `python -m tests.lab.port_node PEERS ARGUMENT…`.

PEERS are addresses by commas, or -; the arguments are swarm-node's.  Prints a line for every place that it settles on,
until standard input ends.
"""

import asyncio
import json
import sys

from treeswarm_node.cli import read_config
from treeswarm_node.landlord import Landlord
from treeswarm_node.place import Place, PlaceFinder
from treeswarm_node.serve import serving


async def run(peers: list[str], arguments: list[str]) -> None:
    config, _ = read_config(arguments)

    async def others() -> list[str]:
        return peers

    async def settled(place: Place) -> None:
        print(json.dumps({"address": f"{place.address}#{life.identity.pin}", "how": place.how}), flush=True)

    async with serving(config) as (_, life):
        life.node.landlord = Landlord(life.address.host, config.limits, config.lend_from)
        finder = PlaceFinder(
            *(life.node.transport, life.address.bare, life.identity.pin, others, settled),
            announced=config.announce,
            guests=life.node.guests,
        )
        finding = asyncio.create_task(finder.run())
        await asyncio.to_thread(sys.stdin.read)
        finding.cancel()
        await asyncio.gather(finding, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(run([] if sys.argv[1] == "-" else sys.argv[1].split(","), sys.argv[2:]))
