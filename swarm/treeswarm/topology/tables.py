"""Facts about many nodes as arrays, one per quantity: what placement, rebalancing and routing compute with.  Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.spans import Span

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Names = NDArray[np.str_]

Moves = Mapping[str, Span]
"""Spans that nodes should move to, by node id."""

PlacementState = Literal["joining", "online", "draining"]
STATES: tuple[PlacementState, ...] = ("joining", "online", "draining")
JOINING, ONLINE, DRAINING = range(3)
"""Codes of `STATES` in arrays."""


@dataclass(frozen=True, eq=False)
class NodeTable:
    """One entry per node in each field, which is an array with the nodes as its first axis."""

    nodes: Names
    """Ids of the nodes."""
    start: Ints
    """First block of each span."""
    end: Ints
    """Block after the last one of each span."""

    def select(self, kept: Mask) -> Self:
        """Return the table of the nodes for which `kept`, bool [nodes], is true."""
        return type(self)(*(getattr(self, column.name)[kept] for column in fields(self)))

    def overlapping(self, span: Span) -> Mask:
        """Return for each node whether it serves a block of `span`, bool [nodes]."""
        return (self.start < span.end) & (span.start < self.end)


@dataclass(frozen=True)
class Placed:
    """Where one node is placed, and how fast it computes."""

    node: str
    """Id of the node."""
    span: Span
    rate: float
    """Block-rows per second: the node's throughput over k blocks is rate / k rows per second."""
    state: PlacementState


@dataclass(frozen=True, eq=False)
class PlacementTable(NodeTable):
    """A snapshot of a swarm's placement.  What every node would compute from it is computed once."""

    rate: Floats
    """Block-rows per second of each node."""
    state: Ints
    """Code of each node's state: its index in `STATES`."""

    @classmethod
    def of(cls, swarm: "PlacementTable | Sequence[Placed]") -> "PlacementTable":
        """Return `swarm` as a table; a table is returned as it is."""
        if isinstance(swarm, PlacementTable):
            return swarm
        return cls(
            np.array([placed.node for placed in swarm], np.str_),
            np.array([placed.span.start for placed in swarm], np.int64),
            np.array([placed.span.end for placed in swarm], np.int64),
            np.array([placed.rate for placed in swarm], np.float64),
            np.array([STATES.index(placed.state) for placed in swarm], np.int64),
        )

    def with_online(self, placed: Placed) -> "PlacementTable":
        """Return the table with one more node, which is online."""
        return PlacementTable(
            np.append(self.nodes, placed.node),
            np.append(self.start, placed.span.start),
            np.append(self.end, placed.span.end),
            np.append(self.rate, placed.rate),
            np.append(self.state, ONLINE),
        )

    def throughput(self, blocks: int) -> Floats:
        """Return the rows per second that each block can compute, float64 [blocks].

        Joining nodes count, draining ones do not.
        """
        stays = self.state != DRAINING
        start, end = self.start[stays], self.end[stays]
        return _sum_per_block(start, end, self.rate[stays] / (end - start), blocks)

    def replicas(self, blocks: int, state: int) -> Ints:
        """Return the number of nodes in `state` (a code) that have each block, int64 [blocks]."""
        here = self.state == state
        return _sum_per_block(self.start[here], self.end[here], np.ones(here.sum()), blocks).round().astype(np.int64)

    @cached_property
    def moves(self) -> dict[int, Moves]:
        """Plans of moves made from this snapshot so far, by number of blocks."""
        return {}

    @cached_property
    def healing(self) -> dict[int, list[Moves]]:
        """Plans of how to fill holes made from this snapshot so far, a plan per turn, by number of blocks."""
        return {}


def _sum_per_block(start: Ints, end: Ints, value: Floats, blocks: int) -> Floats:
    """Return for each block the sum of `value` over the spans that contain it, float64 [blocks]."""
    steps = np.bincount(start, value, blocks + 1)[: blocks + 1] - np.bincount(end, value, blocks + 1)[: blocks + 1]
    summed: Floats = steps.cumsum()[:blocks].astype(np.float64)  # without any span numpy counts in integers
    # Adding a value and subtracting it again leaves rounding behind, and an empty block must read as empty.
    summed[np.abs(summed) < 1e-9 * max(1.0, float(value.sum()))] = 0.0
    return summed
