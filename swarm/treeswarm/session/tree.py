"""The token tree: the one data structure that client and every node hold for a session.

    trunk   committed text, a line of positions 0 .. trunk_length - 1; its last node is the tip
    crown   speculation hanging off the tip; a node's position is its depth in the whole text

A node's id is counted up by the client and never reused.  Id 0 is the root, before the text.  Committing a
path makes its end the new tip; whatever does not hang below it is dead, on every machine, by the parent table
alone: there is no message that frees.

A tree is immutable: every change gives a new one, so a refused change leaves nothing half done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode

ROOT = 0
TIP = -1
"""In index arrays: the parent is the tip, not a crown node."""

Indices = NDArray[np.int64]


def _no_indices() -> Indices:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Crown arrays run in order of ids; an index is a place in them.

    `ancestors[i, j]` says that node j is node i or above it: row i of an attention mask.
    """

    trunk_length: int = 0
    tip: int = ROOT
    next_id: int = ROOT + 1
    ids: Indices = field(default_factory=_no_indices)
    parents: Indices = field(default_factory=_no_indices)
    positions: Indices = field(default_factory=_no_indices)
    tokens: Indices = field(default_factory=_no_indices)
    ancestors: NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 0), np.bool_))

    def __len__(self) -> int:
        """Nodes in the crown."""
        return len(self.ids)

    def indices_of(self, ids: Sequence[int] | NDArray[np.integer]) -> Indices:
        """Places of `ids` in the crown, -1 where an id is no live crown node."""
        wanted = np.asarray(ids, np.int64)
        if not len(self.ids):
            return np.full(wanted.shape, -1)
        places = self.ids.searchsorted(wanted)
        places[places == len(self.ids)] = 0
        places[self.ids[places] != wanted] = -1
        return places

    def add(self, first_id: int, parent_ids: NDArray[np.integer], tokens: NDArray[np.integer]) -> "TokenTree":
        """Grow the crown by nodes `first_id`, `first_id + 1`, …

        A parent is the tip, a live crown node or an earlier node of the same call.  Raises Refused (bad-tree).
        """
        if not len(tokens):
            return self
        self._check_first_id(first_id)
        old, new = len(self), len(tokens)
        place_of = {node: place for place, node in enumerate(self.ids.tolist())} | {self.tip: TIP}
        parents: list[int] = []
        positions = self.positions.tolist()
        ancestors = np.zeros((old + new, old + new), np.bool_)
        ancestors[:old, :old] = self.ancestors
        # Row by row: a parent comes before its children, and a usual append has so few rows that array operations over
        # all of them cost more than they save.
        for node, parent in enumerate(np.asarray(parent_ids).tolist(), first_id):
            above = place_of.get(parent)
            if above is None:
                raise _bad(_no_parent(parent, first_id, new))
            row = place_of[node] = len(positions)
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

        Returns the tree and the indices, in this tree, of the crown nodes that live on.  Raises Refused (bad-tree).
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
        """The same, and nothing of the crown lives on: the walk left it.  Raises Refused (bad-tree)."""
        tip = int(self.ids[self._end_of(path)]) if len(path) else self.tip
        return TokenTree(self.trunk_length + len(path), tip, self.next_id)

    def _end_of(self, path: Sequence[int] | NDArray[np.integer]) -> int:
        """Place of the last node of a path from the tip; raises Refused (bad-tree) for anything else."""
        places = self.indices_of(path).tolist()
        if min(places) < 0:
            raise _bad(f"commit names node {int(path[places.index(-1)])}, which is no live crown node")
        if self.parents[places].tolist() != [TIP, *places[:-1]]:
            raise _bad("commit names nodes that are no path from the tip")
        return int(places[-1])

    def join(self, first_id: int, parent_ids: NDArray[np.integer]) -> "TokenTree":
        """Prefill: a chain from the tip that joins the trunk at once; a crown beside it is dead.

        Raises Refused (bad-tree).
        """
        count = len(parent_ids)
        if not count:
            return self
        self._check_first_id(first_id)
        chain = np.concatenate([[self.tip], np.arange(first_id, first_id + count - 1)])
        if not np.array_equal(parent_ids, chain):
            raise _bad("a prefill is no chain from the tip")
        last = first_id + count - 1
        return TokenTree(trunk_length=self.trunk_length + count, tip=last, next_id=last + 1)

    def alive_below(self, tip: int) -> NDArray[np.bool_]:
        """Which crown nodes can still matter once `tip` is the tip: those below it, it, and the path to it.

        All of them where `tip` is no crown node (a hint from another time says nothing).
        """
        (place,) = self.indices_of([tip])
        if place < 0:
            return np.ones(len(self), np.bool_)
        return np.asarray(self.ancestors[:, place] | self.ancestors[place])

    def _check_first_id(self, first_id: int) -> None:
        if first_id < self.next_id:
            raise _bad(f"node id {first_id} was used before: the next free id is {self.next_id}")


def _no_parent(parent: int, first_id: int, new: int) -> str:
    if first_id <= parent < first_id + new:
        return "a node's parent comes after it"
    return f"parent {parent} is neither the tip nor a live crown node"


def _bad(message: str) -> Refused:
    return Refused(message, FaultCode.BAD_TREE)
