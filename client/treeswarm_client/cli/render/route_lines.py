"""A chain and what happened to it, for `--show-route`."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from treeswarm_client.chain.chain import Chain
from treeswarm_client.discovery.route import Hop


def route_lines(chain: Chain) -> Iterator[Text]:
    """The chain as it ended, then each repair: who was let go and why, who came instead, and how long it took."""
    for hop in chain.hops:
        yield Text(f"blocks {hop.span}: {_name(hop)}", style="dim")
    for repair in chain.repairs:
        for hop, why in repair.lost:
            yield Text(f"left {_name(hop)} (blocks {hop.span}): {why}", style="yellow")
        came = ", ".join(f"{_name(hop)} (blocks {hop.span})" for hop in repair.gained)
        with_whom = f"went on with {came}" if came else "went on with the same nodes"
        yield Text(f"{with_whom} after {1e3 * repair.seconds:.0f} ms", style="green")


def route_as_dict(chain: Chain) -> dict[str, Any]:
    """The same for machines."""
    return {
        "hops": [_hop(hop) for hop in chain.hops],
        "repairs": [
            {
                "epoch": repair.epoch,
                "lost": [_hop(hop) | {"why": why} for hop, why in repair.lost],
                "gained": [_hop(hop) for hop in repair.gained],
                "seconds": repair.seconds,
            }
            for repair in chain.repairs
        ],
    }


def _hop(hop: Hop) -> dict[str, str]:
    return {"node": hop.node, "address": hop.address.partition("#")[0], "blocks": str(hop.span)}


def _name(hop: Hop) -> str:
    return f"{hop.node[:8]} at {hop.address.partition('#')[0]}"
