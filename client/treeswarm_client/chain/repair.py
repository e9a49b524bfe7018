"""The plan of a repair: the nodes that stay, the new ones that fill the gaps, and who sends the trunk to whom.  Pure.

The trunk here is the committed text that every survivor has.  Opening a session is the repair of a chain without nodes.

survivors      nodes that have the trunk, and whose control stream is open or could be opened again
gaps           blocks between the survivors; the router names new nodes for each
open           new nodes open the session and wait for the trunk to be replayed
resume         survivors cut their trunks back to the same length; the one before a gap sends its replay log to the
               first new node, and each new node forwards it to the next new one

If no other nodes serve a gap, the survivors beside it may: their nodes are opened again, for more blocks.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from treeswarm.errors import MissingBlocks, Refused, SwarmError
from treeswarm.protocol.spans import Span
from treeswarm_client.chain.member import CLIENT, Upstream
from treeswarm_client.discovery.route import Hop, gaps

FindRoute = Callable[[Span, str | None, str | None, Collection[str]], Sequence[Hop]]
"""Names nodes for a gap: called with the blocks, the ids of the nodes before and after the gap (None for the client),
and the ids of nodes to avoid.  Raises MissingBlocks or Refused."""


@dataclass(frozen=True)
class Repair:
    """One repair of a chain."""

    epoch: int
    """Number of the epoch that the repair began."""
    lost: tuple[tuple[Hop, str], ...]
    """Nodes that left the chain, each with the reason."""
    gained: tuple[Hop, ...]
    """Nodes that joined the chain, or serve other blocks of it than before."""
    seconds: float
    """Seconds from the first sign of a failure to a chain that takes appends again.  The replay may still run."""


@dataclass(frozen=True)
class MemberState:
    """What a plan needs to know of one node of the chain."""

    hop: Hop
    proven: bool
    """Whether the node has the whole trunk."""
    leaving: bool = False
    """Whether the node asked to leave."""
    upstream: Upstream = None
    """Sender on the link into the node, or None if that link does not exist or broke."""


@dataclass(frozen=True)
class PlannedNode:
    """One node of the chain after the repair."""

    hop: Hop
    new: bool
    """Whether the node opens the session; otherwise it resumes it."""
    new_link: bool
    """Whether the link into the node is a new one.  It needs a new ticket, so that the node ignores the old link."""
    sends_trunk: bool
    """Whether the node sends the trunk to the next one, which is new: a survivor from its replay log, a new node by
    forwarding what it receives."""


@dataclass(frozen=True)
class RepairPlan:
    """The chain after the repair."""

    nodes: tuple[PlannedNode, ...]
    """Nodes of the chain, head first."""
    closed: tuple[Hop, ...]
    """Nodes of the chain before the repair whose session is closed."""
    reopened: tuple[Hop, ...] = ()
    """Nodes of the chain before the repair that open the session again, as they were then.

    Opening ends what they had of it, and closing it would end what they open."""

    @property
    def head(self) -> PlannedNode:
        """The first node.  If it is new, the client itself replays the trunk's tokens to it."""
        return self.nodes[0]


def plan_repair(
    members: Sequence[MemberState], lost: Collection[str], blocks: int, find_route: FindRoute
) -> RepairPlan:
    """Plan how to make the chain of `members` (in order) whole again over all `blocks` blocks.

    `lost` are the addresses of nodes that must not be used.  Survivors stay where others serve the gaps.  A node that
    asked to leave is left out if the others can serve its blocks; otherwise it stays.  Raises MissingBlocks or Refused
    (full) if `find_route` does.
    """
    survivors = [m for m in members if m.proven and m.hop.address not in lost]
    staying = [m for m in survivors if not m.leaving]
    missing: SwarmError | None = None
    for kept in [staying] if len(staying) == len(survivors) else [staying, survivors]:
        try:
            return _plan(members, lost, kept, blocks, find_route)
        except (MissingBlocks, Refused) as error:
            missing = error
        for fewer in _with_wider_gaps(kept, blocks):
            with contextlib.suppress(MissingBlocks, Refused):
                return _plan(members, lost, fewer, blocks, find_route)
    assert missing is not None
    raise missing


def _with_wider_gaps(staying: Sequence[MemberState], blocks: int) -> Iterator[list[MemberState]]:
    """Yield what is left of the survivors without those after the gaps, before the gaps, both, and all of them.

    A node is visited once per traversal, so one that has other blocks may fill a gap only together with these.
    """
    edges = [index for index, _ in gaps([member.hop.span for member in staying], blocks)]
    after, before = {*edges}, {index - 1 for index in edges}
    tried = [[*staying]]
    for out in (after, before, after | before, set(range(len(staying)))):
        fewer = [member for index, member in enumerate(staying) if index not in out]
        if fewer not in tried:
            tried.append(fewer)
            yield fewer


def _plan(
    members: Sequence[MemberState],
    lost: Collection[str],
    staying: Sequence[MemberState],
    blocks: int,
    find_route: FindRoute,
) -> RepairPlan:
    chain: list[tuple[Hop, MemberState | None]] = [(member.hop, member) for member in staying]
    avoid = {m.hop.node for m in members if m in staying or m.leaving or m.hop.address in lost}
    for index, gap in reversed(gaps([member.hop.span for member in staying], blocks)):
        before = staying[index - 1].hop.node if index else None
        after = staying[index].hop.node if index < len(staying) else None
        hops = find_route(gap, before, after, avoid)
        avoid |= {hop.node for hop in hops}
        chain[index:index] = [(hop, None) for hop in hops]
    nodes = []
    for index, (hop, survivor) in enumerate(chain):
        upstream_hop, upstream_survivor = chain[index - 1] if index else (CLIENT, None)
        upstream_is_new = index > 0 and upstream_survivor is None
        downstream_is_new = index + 1 < len(chain) and chain[index + 1][1] is None
        new_link = survivor is None or upstream_is_new or survivor.upstream != upstream_hop
        nodes.append(PlannedNode(hop, survivor is None, new_link, downstream_is_new))
    opened = {node.hop.node for node in nodes if node.new}
    left = [member.hop for member in members if member not in staying]
    reopened = tuple(hop for hop in left if hop.node in opened)
    return RepairPlan(tuple(nodes), tuple(hop for hop in left if hop not in reopened), reopened)
