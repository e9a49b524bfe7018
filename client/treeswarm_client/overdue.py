"""Who keeps a frame, when no answer comes though every node is alive.  Pure."""

from collections.abc import Sequence

from treeswarm.errors import NodeLost, SwarmError
from treeswarm_client.mending import Member
from treeswarm_client.route import Hop

# A frame handed to one node and not received by the next: some megabytes over a slow line take this long.
LEAST_ON_THE_WAY_S = 5.0
# A frame received and not passed on: the longest a forward may take on a slow CPU under load, several times.
LEAST_IN_A_NODE_S = 60.0


def overdue(
    members: Sequence[Member], oldest_seq: int, moved_at: float, usual_s: float, now: float
) -> tuple[Hop, SwarmError] | None:
    """The node that append `oldest_seq` waits for too long, and how to say so; None while there is hope.

    `moved_at`: when the chain last took or answered a frame; `usual_s`: what a traversal usually takes.  A node's pongs
    tell how far the session's appends have come there, so the first that lacks the append is the one.
    """
    for member in members:
        quiet_s = now - max(moved_at, member.control.moved_at)
        if member.control.received <= oldest_seq:
            if quiet_s > max(LEAST_ON_THE_WAY_S, 2 * usual_s):
                return _lost(member.hop, f"a frame has been on its way there for {quiet_s:.0f} s")
            return None
    slowest = min(members, key=lambda member: member.control.moved_at)
    quiet_s = now - max(moved_at, slowest.control.moved_at)
    if quiet_s > max(LEAST_IN_A_NODE_S, 8 * usual_s):
        return _lost(slowest.hop, f"it computes for {quiet_s:.0f} s")
    return None


def _lost(hop: Hop, why: str) -> tuple[Hop, SwarmError]:
    return hop, NodeLost(f"lost {hop}: {why}", hop.address)
