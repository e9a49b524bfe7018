"""Which node takes over blocks that lost their last holder, and when.  Pure.

Every node computes the same plan from the same snapshot, without the nodes it believes to be dead, and the nodes that
the plan names act.  A named node may be unable to move, because its owner fixed its blocks or its release is older.  So
the plan has turns: if a hole is still open after one turn, the nodes of the next turn act, twice as many each time.

A node first announces its claim: a record that says it joins over the blocks of the hole.  It still has its old blocks.
Then it asks the nodes that the claim concerns for their newest records (`nodes_to_ask`), judges it (`judge_claim`), and
only then gives its old blocks up.  As a node changes its own record before it asks, at least one of two nodes that ask
each other sees the other's claim, however late the registry is.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from treeswarm.protocol.spans import Span
from treeswarm.topology.rebalancing import plan_moves
from treeswarm.topology.tables import JOINING, ONLINE, Ints, Moves, Placed, PlacementTable

# Of this many turns, the last one asks up to 2**7 nodes.
TURNS = 8
# Seconds beyond the registry's lag that one turn lasts: the named nodes have probed and announced by then.
TURN_MARGIN_S = 4.0

# So many holders of each block that a node gives up are asked: one may be dead, and one may be leaving as well.
HOLDERS_ASKED = 3
# So many nodes that may claim the same hole are asked.  More are named in late turns only, when most cannot move.
RIVALS_ASKED = 32
# A node that joins over a hole for longer does not fill it, and no longer counts: loading takes a minute or two.  Where
# it is downloading, one other node per this time begins to load as well.
JOINING_TRUST_S = 180.0

Verdict = Literal["load", "wait", "withdraw"]


def find_holes(swarm: PlacementTable, blocks: int) -> list[Span]:
    """Return the blocks that no node serves, and none is about to serve, as spans."""
    empty = _count_holders(swarm, blocks) == 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], empty, [False]]).astype(np.int64)))
    return [Span(start, end) for start, end in edges.reshape(-1, 2).tolist()]


def plan_healing(swarm: PlacementTable, blocks: int, turn: int) -> Moves:
    """Return which nodes should take over which blocks in the given turn, counted from 0; nothing without a hole.

    After the last turn the first one follows again.
    """
    turns = swarm.healing.setdefault(blocks, [])
    # Few turns are ever needed, and each of them takes twice as long to plan.
    while len(turns) <= turn and len(turns) < TURNS and (not turns or turns[-1]):
        turns.append(_plan_turn(swarm, blocks, turns))
    acting = [moves for moves in turns if moves]
    return acting[turn % len(acting)] if acting else {}


def judge_claim(claim: Placed, former: Span, swarm: PlacementTable, blocks: int) -> Verdict:
    """Return what the node of `claim`, which still has its blocks `former`, does now that others have seen the claim.

    `swarm` holds the other nodes.  Of several claims on the same blocks the one of the lowest id stands, and the others
    withdraw.  It waits until they have: a node that joins on is loading already, because it asked before this claim.
    A node loads only if every block that it gives up is online elsewhere.
    """
    others = swarm.select(swarm.nodes != claim.node)
    later = (others.state == JOINING) & others.overlapping(claim.span) & (others.nodes > claim.node)
    holders = _count_holders(others.select(~later), blocks)
    if (holders[claim.span.start : claim.span.end] > 0).all():
        return "withdraw"
    if later.any():
        return "wait"
    return "load" if is_served(former, others, blocks) else "withdraw"


def is_served(span: Span, swarm: PlacementTable, blocks: int) -> bool:
    """Return whether every block of `span` is online."""
    return bool((swarm.replicas(blocks, ONLINE)[span.start : span.end] > 0).all())


def nodes_to_ask(former: Span, swarm: PlacementTable, rivals: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return which nodes of `swarm` a claim concerns: the `rivals`, and online holders of the blocks given up.

    All rivals must answer, and of the holders so many that they have all these blocks.
    """
    present = set(swarm.nodes.tolist())
    asked, holders = np.zeros(former.end, np.int64), list[str]()
    for index in np.flatnonzero((swarm.state == ONLINE) & swarm.overlapping(former)).tolist():
        part = slice(max(former.start, int(swarm.start[index])), int(swarm.end[index]))
        if (asked[part] < HOLDERS_ASKED).any():
            asked[part] += 1
            holders.append(str(swarm.nodes[index]))
    return [name for name in dict.fromkeys(rivals) if name in present][:RIVALS_ASKED], holders


def _count_holders(swarm: PlacementTable, blocks: int) -> Ints:
    """Return the number of nodes that serve each block or are about to, int64 [blocks].

    Their rates do not count: the nodes state them, and beside one enormous rate all others would round to nothing.
    """
    return swarm.replicas(blocks, ONLINE) + swarm.replicas(blocks, JOINING)


def _plan_turn(swarm: PlacementTable, blocks: int, earlier: Sequence[Moves]) -> Moves:
    """Return the moves of the turn after the `earlier` ones; none if no other node can help."""
    throughput = swarm.throughput(blocks)
    if (throughput > 0).all():
        return {}
    named = [node for moves in earlier for node in moves]
    movable = swarm.select((swarm.state == ONLINE) & (swarm.end <= blocks) & ~np.isin(swarm.nodes, named))
    replicas, moves = swarm.replicas(blocks, ONLINE), dict[str, Span]()
    for _ in range(2 ** len(earlier)):
        plan = plan_moves(throughput, replicas, movable, only_empty=True)
        if not plan:
            break
        moves |= plan
        movable = movable.select(~np.isin(movable.nodes, list(plan)))
    return moves
