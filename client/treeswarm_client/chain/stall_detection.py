"""Find the hop that holds a stalled frame while every node still answers pings.  Pure."""

from treeswarm.errors import NodeLost, SwarmError
from treeswarm_client.chain.epoch import Epoch
from treeswarm_client.discovery.route import Hop

# A frame handed to one node and not received by the next: some megabytes over a slow line take this long.
LEAST_ON_LINK_S = 5.0
# A frame received and not passed on: the longest a forward may take on a slow CPU under load, several times.
LEAST_IN_NODE_S = 60.0


def find_stalled_hop(epoch: Epoch, usual_s: float, now: float) -> tuple[Hop, SwarmError] | None:
    """Return the node that holds the oldest unanswered append too long, with the error that says so, or None.

    A pong tells what a node had when it was pinged; later silence is judged by its control stream, not here.

    `usual_s` is the usual duration of a traversal and `now` the loop's time, both in seconds.  Pongs tell how many of
    the session's appends a node has received and passed on, so the first node that has not passed the append on holds
    it.  In an epoch that replays, new nodes receive the trunk first, in forwards of hundreds of rows per frame.
    """
    oldest, moved_at = epoch.in_flight.oldest, epoch.in_flight.moved_at
    on_link_s, in_node_s = max(LEAST_ON_LINK_S, 2 * usual_s), max(LEAST_IN_NODE_S, 8 * usual_s)
    for member in epoch.members:
        progress = member.control.progress
        moved_at = max(moved_at, progress.changed_at)
        quiet_s = min(now, progress.known_at) - moved_at
        if progress.received <= oldest and quiet_s > on_link_s and (member.proven or not epoch.replays):
            return _lost(member.hop, f"a frame has been on its way there for {quiet_s:.0f} s")
        if progress.passed_on <= oldest:
            return _lost(member.hop, f"it computes for {quiet_s:.0f} s") if quiet_s > in_node_s else None
    if quiet_s > on_link_s:
        return _lost(epoch.members[-1].hop, f"its answer has been on its way for {quiet_s:.0f} s")
    return None


def _lost(hop: Hop, reason: str) -> tuple[Hop, SwarmError]:
    return hop, NodeLost(f"lost {hop}: {reason}", hop.address)
