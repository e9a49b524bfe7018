"""Describes drivers, a chain and its repairs, for `--show-route`."""

from collections.abc import Iterator

from rich.text import Text

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


def _name(hop: Hop) -> str:
    return f"{hop.node[:8]} at {hop.address.partition('#')[0]}"
