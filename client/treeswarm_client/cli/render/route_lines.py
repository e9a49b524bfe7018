"""Describes drivers, a chain and its repairs, for `--show-route`."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from treeswarm.protocol.address import without_pin
from treeswarm_client.chain.chain import Chain
from treeswarm_client.cli.render.live import escape_controls
from treeswarm_client.discovery.route import Hop
from treeswarm_client.generation.run import Run


def driver_lines(run: Run) -> Iterator[Text]:
    """Yield who drove the text and why, with the nodes that a driver named."""
    for use in run.drivers:
        yield Text(f"driver: {use.node[:8]} at {use.address}, {use.why}: {use.tokens} tokens", style="dim")
        for hop in use.hops:
            yield Text(escape_controls(f"blocks {hop.span}: {hop.node[:8]} at {hop.address}"), style="dim")
        if use.ended is not None:
            yield Text(escape_controls(f"this driver ended: {use.ended}"), style="yellow")
    if run.chain is not None:
        yield Text(f"driver: this client, {run.drive_why}", style="dim")


def drivers_as_dict(run: Run) -> dict[str, Any]:
    """Return the same as an object for JSON."""
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


def route_lines(chain: Chain) -> Iterator[Text]:
    """Yield the hops of the chain at its end, then for each repair the hops lost, the hops gained and the duration."""
    for hop in chain.hops:
        yield Text(f"blocks {hop.span}: {_name(hop)}", style="dim")
    for repair in chain.repairs:
        for hop, reason in repair.lost:
            yield Text(f"lost {_name(hop)} (blocks {hop.span}): {reason}", style="yellow")
        gained = ", ".join(f"{_name(hop)} (blocks {hop.span})" for hop in repair.gained)
        outcome = f"continued with {gained}" if gained else "continued with the same nodes"
        yield Text(f"{outcome} after {1e3 * repair.seconds:.0f} ms", style="green")


def route_as_dict(chain: Chain) -> dict[str, Any]:
    """Return the same as an object for JSON."""
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


def _name(hop: Hop) -> str:
    return f"{hop.node[:8]} at {hop.address.partition('#')[0]}"
