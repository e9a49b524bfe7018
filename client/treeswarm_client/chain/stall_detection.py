"""Who keeps a frame, when no answer comes though every node is alive.  Pure."""

from collections.abc import Sequence

from treeswarm.errors import NodeLost, SwarmError
from treeswarm_client.chain.repair import ChainMember
from treeswarm_client.discovery.route import Hop

# A frame handed to one node and not received by the next: some megabytes over a slow line take this long.
LEAST_ON_THE_WAY_S = 5.0
# A frame received and not passed on: the longest a forward may take on a slow CPU under load, several times.
LEAST_IN_A_NODE_S = 60.0


def find_stalled_hop(
    members: Sequence[ChainMember], oldest_seq: int, moved_at: float, usual_s: float, now: float, *, replays: bool
) -> tuple[Hop, SwarmError] | None:
    """The node that append `oldest_seq` waits for too long, and how to say so; None while there is hope.

    `moved_at`: when the chain last took or answered a frame; `usual_s`: what a traversal usually takes; with `replays`,
    members not yet proven get the trunk first, a forward of hundreds of rows a frame.  A node's pongs tell how far the
    session's appends have come there, so the first that has not passed the append on is the one.
    """
    on_the_way_s, in_a_node_s = max(LEAST_ON_THE_WAY_S, 2 * usual_s), max(LEAST_IN_A_NODE_S, 8 * usual_s)
    for member in members:
        control = member.control
        moved_at = max(moved_at, control.moved_at)
        quiet_s = now - moved_at
        if control.received <= oldest_seq and quiet_s > on_the_way_s and (member.proven or not replays):
            return _lost(member.hop, f"a frame has been on its way there for {quiet_s:.0f} s")
        if control.passed_on <= oldest_seq:
            return _lost(member.hop, f"it computes for {quiet_s:.0f} s") if quiet_s > in_a_node_s else None
    quiet_s = now - moved_at
    if quiet_s > on_the_way_s:
        return _lost(members[-1].hop, f"its answer has been on its way for {quiet_s:.0f} s")
    return None


def _lost(hop: Hop, why: str) -> tuple[Hop, SwarmError]:
    return hop, NodeLost(f"lost {hop}: {why}", hop.address)
