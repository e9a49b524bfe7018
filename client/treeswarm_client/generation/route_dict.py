"""The route of a run as plain data: drivers, the hops of a chain and its repairs."""

from typing import Any

from treeswarm.protocol.address import without_pin
from treeswarm_client.chain.chain import Chain
from treeswarm_client.discovery.route import Hop
from treeswarm_client.generation.run import Run


def drivers_as_dict(run: Run) -> dict[str, Any]:
    """Return who drove the text and why, with the nodes that a driver named, as an object for JSON."""
    return {
        "nodes": [
            {
                "node": use.node,
                "address": use.address,
                "why": use.why,
                "tokens": use.tokens,
                "hops": [{"node": hop.node, "address": hop.address, "blocks": str(hop.span)} for hop in use.hops],
                "ended": use.ended,
            }
            for use in run.drivers
        ],
        "why": run.drive_why,
    }


def route_as_dict(chain: Chain) -> dict[str, Any]:
    """Return the hops of the chain now, and its repairs, as an object for JSON."""
    return {
        "hops": [_hop(hop) for hop in chain.hops],
        "repairs": [
            {
                "epoch": repair.epoch,
                "lost": [_hop(hop) | {"why": reason} for hop, reason in repair.lost],
                "gained": [_hop(hop) for hop in repair.gained],
                "seconds": repair.seconds,
            }
            for repair in chain.repairs
        ],
    }


def _hop(hop: Hop) -> dict[str, str]:
    return {"node": hop.node, "address": without_pin(hop.address), "blocks": str(hop.span)}
