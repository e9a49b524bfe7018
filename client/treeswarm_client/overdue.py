"""Which node a frame waits for too long, by how far each says that it has come.  Pure."""

from collections.abc import Sequence

from treeswarm.errors import NodeLost
from treeswarm_client.mending import Member
from treeswarm_client.route import Hop

# A frame handed to one node and not received by the next: some megabytes over a slow line take this long.
LEAST_ON_THE_WAY_S = 5.0
# A frame received and not passed on: the longest a forward may take on a slow CPU under load, several times.
LEAST_IN_A_NODE_S = 60.0


def overdue(
    members: Sequence[Member], oldest: int, since: float, now: float, usual_s: float, *, replays: bool
) -> tuple[Hop, NodeLost] | None:
    """The node that has the append `oldest`, or should have it, for too long, and why.

    `since`: when anything was last shipped or answered; `usual_s`: a traversal's deadline; with `replays`, members not
    yet proven get the trunk first, a forward of hundreds of rows a frame.
    """
    on_the_way_s, in_a_node_s = max(LEAST_ON_THE_WAY_S, 2 * usual_s), max(LEAST_IN_A_NODE_S, 8 * usual_s)
    for member in members:
        control, hop = member.control, member.hop
        since = max(since, control.moved_at)
        quiet_s = now - since
        if control.received <= oldest and quiet_s > on_the_way_s and (member.proven or not replays):
            return hop, NodeLost(f"lost {hop}: a frame has been on its way there for {quiet_s:.0f} s", hop.address)
        if control.passed_on <= oldest:
            why = f"lost {hop}: it computes for {quiet_s:.0f} s"
            return (hop, NodeLost(why, hop.address)) if quiet_s > in_a_node_s else None
    tail, quiet_s = members[-1].hop, now - since
    if quiet_s > on_the_way_s:
        return tail, NodeLost(f"lost {tail}: its answer has been on its way for {quiet_s:.0f} s", tail.address)
    return None
