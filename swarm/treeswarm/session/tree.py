"""The token tree: the one data structure that the client and every node keep for a session.

    trunk   committed text, a line of positions 0 .. trunk_length - 1; its last node is the tip
    crown   speculation below the tip; a node's position is its depth in the whole text

Node ids are counted up by the client and never reused.  Id 0 is the root, before the text.  Committing a path makes its
end the new tip.  Every node that is not below the new tip is dead, on every machine, by the parent table alone: no
message frees a node.

A tree is immutable.  Every change returns a new tree, so a refused change leaves nothing half done.

One tree node has a different name in each part of the code:

    name          where it is used                           who translates it
    draft index   client: drafters, planner, walk            `AppendBuilder`: draft index ↔ id (`Shipment.answer_ids`)
    id            messages between client and nodes          `TokenTree.indices_of`: id → crown index
    crown index   here: place in the crown arrays of a tree  `NodeSession`: crown index → crown slot
    crown slot    `Step`, attention masks                    `SessionKV.crown_rows`: crown slot → pool row
    pool row      a node's KV cache, attention

A draft index holds for one draft tree, an id for the whole session and on every machine.  A crown index changes with
every commit.  Each node of the chain chooses crown slots and pool rows by itself; both stay the same for as long as the
tree node is in the crown.  A committed node is known by its position alone, which `SessionKV.trunk_rows` translates to
a pool row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode

ROOT = 0
"""Id of the node before the text."""
TIP = -1
"""Stands for the tip where an array holds crown indices of parents."""

Indices = NDArray[np.int64]


def _no_indices() -> Indices:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A trunk's length and a crown.  All crown arrays are in the order of ids, [n] for n crown nodes."""

    trunk_length: int = 0
    """Number of committed tokens."""
    tip: int = ROOT
    """Id of the last committed node."""
    next_id: int = ROOT + 1
    """Smallest id that no node has had yet."""
    ids: Indices = field(default_factory=_no_indices)
    """Id of each crown node, rising."""
    parents: Indices = field(default_factory=_no_indices)
    """Crown index of each node's parent, or TIP."""
    positions: Indices = field(default_factory=_no_indices)
    """Position of each node in the whole text."""
    tokens: Indices = field(default_factory=_no_indices)
    """Token of each node."""
    ancestors: NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 0), np.bool_))
    """`ancestors[i, j]` is true if node j is node i or above it, bool [n, n].  Row i is the mask of node i."""

    def __len__(self) -> int:
        """Return the number of nodes in the crown."""
        return len(self.ids)

    def indices_of(self, ids: Sequence[int] | NDArray[np.integer]) -> Indices:
        """Return the crown index of each id, or -1 for an id that is not a live crown node."""
        queried = np.asarray(ids, np.int64)
        if not len(self.ids):
            return np.full(queried.shape, -1)
        indices = self.ids.searchsorted(queried)
        indices[indices == len(self.ids)] = 0
        indices[self.ids[indices] != queried] = -1
        return indices

    def add(self, first_id: int, parent_ids: NDArray[np.integer], tokens: NDArray[np.integer]) -> "TokenTree":
        """Return the tree with the crown nodes `first_id`, `first_id + 1`, … added.

        A parent is the tip, a live crown node or an earlier node of the same call.  Raises Refused (bad-tree).
        """
        if not len(tokens):
            return self
        self._check_first_id(first_id)
        old, new = len(self), len(tokens)
        index_of = {node: index for index, node in enumerate(self.ids.tolist())} | {self.tip: TIP}
        parents: list[int] = []
        positions = self.positions.tolist()
        ancestors = np.zeros((old + new, old + new), np.bool_)
        ancestors[:old, :old] = self.ancestors
        # Row by row, because a parent comes before its children.  Appends usually have so few rows that operations on
        # whole arrays cost more than they save.
        for node, parent in enumerate(np.asarray(parent_ids).tolist(), first_id):
            above = index_of.get(parent)
            if above is None:
                raise _bad(_no_parent(parent, first_id, new))
            row = index_of[node] = len(positions)
            parents.append(above)
            if above == TIP:
                positions.append(self.trunk_length)
            else:
                ancestors[row] = ancestors[above]
                positions.append(positions[above] + 1)
            ancestors[row, row] = True
        return TokenTree(
            trunk_length=self.trunk_length,
            tip=self.tip,
            next_id=first_id + new,
            ids=np.concatenate([self.ids, np.arange(first_id, first_id + new)]),
            parents=np.concatenate([self.parents, np.array(parents, np.int64)]),
            positions=np.array(positions, np.int64),
            tokens=np.concatenate([self.tokens, np.asarray(tokens, np.int64)]),
            ancestors=ancestors,
        )

    def commit(self, path: Sequence[int] | NDArray[np.integer]) -> tuple["TokenTree", Indices]:
        """Make the end of `path` (ids from just after the tip, in order) the new tip.

        Returns the new tree and the crown indices, in this tree, of the nodes that stay in the crown.  Raises Refused
        (bad-tree).
        """
        if not len(path):
            return self, np.arange(len(self))
        end = self._end_of(path)
        below = self.ancestors[:, end].copy()
        below[end] = False
        kept = np.flatnonzero(below)
        reindexed = np.full(len(self) + 1, TIP)
        reindexed[kept] = np.arange(len(kept))
        committed = TokenTree(
            trunk_length=self.trunk_length + len(path),
            tip=int(self.ids[end]),
            next_id=self.next_id,
            ids=self.ids[kept],
            parents=reindexed[self.parents[kept]],
            positions=self.positions[kept],
            tokens=self.tokens[kept],
            ancestors=self.ancestors[kept[:, None], kept],
        )
        return committed, kept

    def commit_alone(self, path: Sequence[int] | NDArray[np.integer]) -> "TokenTree":
        """Return the tree with `path` committed and no crown, as after a walk that left the tree.

        Raises Refused (bad-tree).
        """
        tip = int(self.ids[self._end_of(path)]) if len(path) else self.tip
        return TokenTree(self.trunk_length + len(path), tip, self.next_id)

    def _end_of(self, path: Sequence[int] | NDArray[np.integer]) -> int:
        """Return the crown index of the last node of `path`.  Raises Refused (bad-tree) unless it is a path from the
        tip."""
        indices = self.indices_of(path).tolist()
        if min(indices) < 0:
            raise _bad(f"commit names node {int(path[indices.index(-1)])}, which is not a live crown node")
        if self.parents[indices].tolist() != [TIP, *indices[:-1]]:
            raise _bad("commit names nodes that are not a path from the tip")
        return int(indices[-1])

    def join(self, first_id: int, parent_ids: NDArray[np.integer]) -> "TokenTree":
        """Return the tree after a prefill: a chain of nodes below the tip joins the trunk at once, and the crown dies.

        Raises Refused (bad-tree).
        """
        count = len(parent_ids)
        if not count:
            return self
        self._check_first_id(first_id)
        chain = np.concatenate([[self.tip], np.arange(first_id, first_id + count - 1)])
        if not np.array_equal(parent_ids, chain):
            raise _bad("a prefill must be a chain from the tip")
        last = first_id + count - 1
        return TokenTree(trunk_length=self.trunk_length + count, tip=last, next_id=last + 1)

    def alive_below(self, tip: int) -> NDArray[np.bool_]:
        """Return which crown nodes can still matter once `tip` is the tip, bool [n]: the path to it and all below it.

        If `tip` is not a crown node, the hint that named it is too old or too new, and every node can still matter.
        """
        (index,) = self.indices_of([tip])
        if index < 0:
            return np.ones(len(self), np.bool_)
        return np.asarray(self.ancestors[:, index] | self.ancestors[index])

    def _check_first_id(self, first_id: int) -> None:
        if first_id < self.next_id:
            raise _bad(f"node id {first_id} was used before: the next free id is {self.next_id}")


def _no_parent(parent: int, first_id: int, new: int) -> str:
    if first_id <= parent < first_id + new:
        return f"node {parent} is named as the parent of a node that comes before it"
    return f"parent {parent} is neither the tip nor a live crown node"


def _bad(message: str) -> Refused:
    return Refused(message, FaultCode.BAD_TREE)
