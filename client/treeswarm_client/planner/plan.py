"""How many drafted nodes to ship: the tree that brings most tokens a second.  Pure.

A round ships the bonus token of the last one and the best `size` drafted nodes.  It brings 1 token, and one more for
every node on the target's path: 1 + Σ chances.  Its time is the links', the nodes' and the drafting that nothing hid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import MAX_ROWS, HopTiming
from treeswarm_client.planner.costs import Curve, HopEstimate, LinkEstimate, total

# On the client's own links a row is its parent and token on the way out, and id, token and log-probability back.
CLIENT_ROW_BYTES = 24

DRAFT_SHARE = 0.3

Rows = NDArray[np.float64] | float


@dataclass(frozen=True)
class Costs:
    """What rows cost on one chain."""

    link: LinkEstimate
    hops: tuple[HopEstimate, ...]
    row_bytes: int
    """Of one row on a link between nodes."""
    inner_links: int
    """Between nodes: one less than there are hops."""
    segment_rows: int = MAX_ROWS
    """Larger trees travel as several appends, of which each node computes one while the next is on its way."""

    @cached_property
    def clock(self) -> Curve:
        """What the nodes' forwards take together."""
        return total([hop.clock for hop in self.hops])

    @cached_property
    def price(self) -> Curve:
        """What they cost together, see `node_time.py`."""
        return total([hop.price for hop in self.hops])

    @cached_property
    def queue_s(self) -> float:
        """Of all nodes together."""
        return sum(hop.queue_s for hop in self.hops)

    @cached_property
    def plain_s(self) -> float:
        """What a plain round takes, by the clock."""
        return max(1e-9, float(traversal_s(self, 1.0, priced=False)))


@dataclass(frozen=True)
class Plan:
    """What to ship, and what is expected of it."""

    size: int
    """Nodes, the best ones; 0 is the plain round."""
    tokens: float
    seconds: float
    """Drafting included; rows at their price, see `node_time.py`."""
    rate: float
    """Tokens a second."""


def traversal_s(costs: Costs, rows: Rows, *, priced: bool = True) -> NDArray[np.float64]:
    """Seconds from the client and back with so many rows, of the same shape; not priced: as a clock would show it.

    Segments pass the chain as through a pipeline: the first one pays every stage, each later one the slowest alone.
    """
    count = np.asarray(rows, np.float64)
    first = np.minimum(count, costs.segment_rows)
    forwards = costs.price if priced else costs.clock
    seconds = costs.link.seconds(first * whole_way_bytes(costs)) + costs.queue_s + forwards.at(first)
    after = count - first
    if not after.any():
        return np.asarray(seconds)
    whole, rest = np.divmod(after, costs.segment_rows)
    later = whole * slowest_s(costs, float(costs.segment_rows), priced=priced)
    last = np.where(rest > 0, slowest_s(costs, rest, priced=priced), 0.0)
    return np.asarray(seconds + later + last)


def whole_way_bytes(costs: Costs) -> int:
    """Of one row on all links together."""
    return costs.row_bytes * costs.inner_links + CLIENT_ROW_BYTES


def one_link_bytes(costs: Costs) -> int:
    """Of one row on the link that carries most."""
    return costs.row_bytes if costs.inner_links else CLIENT_ROW_BYTES


def slowest_s(costs: Costs, rows: Rows, *, priced: bool = True) -> NDArray[np.float64]:
    """What a further append of so many rows adds to a traversal under way: its time at the slowest node or link."""
    count = np.asarray(rows, np.float64)
    stages = [costs.link.seconds_per_byte * count * one_link_bytes(costs)]
    forwards = (hop.price if priced else hop.clock for hop in costs.hops)
    return np.asarray(np.max([*stages, *(forward.at(count) for forward in forwards)], axis=0))


def plan_round(
    chances: NDArray[np.float64], costs: Costs, *, exposed_draft_s: NDArray[np.float64] | float = 0.0
) -> Plan:
    """The best prefix of nodes with these chances to be on the target's path, float64 [n], best first.

    `exposed_draft_s` is the drafting that nothing hid, of every size alike or [n + 1] by size.  Of equally good sizes
    the smallest.
    """
    tokens = 1.0 + np.concatenate([[0.0], np.cumsum(chances)])
    seconds = traversal_s(costs, np.arange(1.0, len(chances) + 2)) + exposed_draft_s
    rates = tokens / seconds
    size = int(np.argmax(rates))
    return Plan(size, float(tokens[size]), float(seconds[size]), float(rates[size]))


def plan_of(size: int, chances: NDArray[np.float64], costs: Costs, *, exposed_draft_s: float = 0.0) -> Plan:
    """What is expected of a size that was chosen otherwise."""
    tokens = 1.0 + float(chances[:size].sum())
    # One row alone keeps nobody waiting: its price is its time.
    seconds = (float(traversal_s(costs, 1.0 + size)) if size else costs.plain_s) + exposed_draft_s
    return Plan(size, tokens, seconds, tokens / seconds)


def clock_s(costs: Costs, size: int) -> float:
    """Seconds of a round that ships so many nodes, as a clock would show them."""
    return float(traversal_s(costs, 1.0 + size, priced=False)) if size else costs.plain_s


def cheap_size(costs: Costs, share: float, largest: int) -> int:
    """The most nodes that make a plain round longer by no more than this share of it; at least one."""
    longer = traversal_s(costs, np.arange(1.0, largest + 2))
    return max(1, int(np.searchsorted(longer, longer[0] * (1 + share), side="right")) - 1)


def worth_extending(chances: NDArray[np.float64], later_s: NDArray[np.float64], costs: Costs, rate: float) -> int:
    """How many of the next nodes to send after a tree that is in flight; 0: none.

    `chances` float64 [n], best first; `later_s` [n]: how much later than its parent each would leave, 0 where both
    leave together.  They cost a further forward, the fixed part of it included, at the slowest node; and a text that
    enters them ends the round so much later.  `rate` (tokens a second) is what time is worth, as planned for the round.
    """
    if not len(chances):
        return 0
    busy_s = slowest_s(costs, np.arange(1.0, len(chances) + 1))
    gain = np.cumsum(chances) - rate * (busy_s + np.cumsum(chances * later_s))
    best = int(np.argmax(gain))
    return best + 1 if gain[best] > 0 else 0


def patience_s(costs: Costs) -> float:
    """The longest that a round waits for its draft, whatever that promises: a share of what a plain round takes, about
    what trees of 64 needed where they paid."""
    return DRAFT_SHARE * costs.plain_s


@dataclass(frozen=True)
class Split:
    """Where a traversal's seconds went, along its longest way."""

    wire_s: float
    queue_s: float
    compute_s: float
    bytes: float
    """That `wire_s` had to carry."""


def split(costs: Costs, rows: Sequence[int], seconds: float, timings: Sequence[Sequence[HopTiming]]) -> Split:
    """Take apart a traversal whose appends had so many rows; `timings` per append, per hop.

    Of appends after the first only the slowest stage counts, as in `traversal_s`: the link's time where that is
    believed to be longer than any node's, and then it stays in what is left for the wire.
    """
    if not rows or not timings:
        return Split(seconds, 0.0, 0.0, sum(rows[:1]) * whole_way_bytes(costs))
    queue_s = sum(hop.queue_us for hop in timings[0]) / 1e6
    compute_s = sum(hop.compute_us for hop in timings[0]) / 1e6
    carried = float(rows[0] * whole_way_bytes(costs))
    for count, before, hops in zip(rows[1:], timings, timings[1:], strict=False):
        # Two appends that waited together share a forward, and say so by the same microseconds.
        own = [hop.compute_us for old, hop in zip(before, hops, strict=False) if old.compute_us != hop.compute_us]
        node_s = max(own, default=0) / 1e6
        link_bytes = count * one_link_bytes(costs)
        if link_bytes * costs.link.seconds_per_byte > node_s:
            carried += link_bytes
        else:
            compute_s += node_s
    return Split(max(0.0, seconds - queue_s - compute_s), queue_s, compute_s, carried)
