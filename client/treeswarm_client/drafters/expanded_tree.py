"""What a draft model has worked out below its root: a tree of crown rows that outlives a round.

A node is known by its parent's row and its token, so growth may ask again and again, for larger trees and below a new
root, and only what is new costs a forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.seam import NO_NODE, DraftTree

NO_ROW = -1
"""Among rows: the root above all crown rows, or a node that has none."""


@dataclass(frozen=True, eq=False)
class CandidateNodes:
    """Of some nodes, the best next tokens [n, m], their scores before τ, and their conditional log-scores."""

    tokens: NDArray[np.int64]
    before: NDArray[np.float32]
    scores: NDArray[np.float32]

    def of(self, rows: NDArray[np.int64]) -> "CandidateNodes":
        """Those of some nodes."""
        return CandidateNodes(self.tokens[rows], self.before[rows], self.scores[rows])

    def with_more(self, others: Sequence["CandidateNodes"]) -> "CandidateNodes":
        """These, then the others'."""
        every = (self, *others)
        return CandidateNodes(
            np.concatenate([c.tokens for c in every]),
            np.concatenate([c.before for c in every]),
            np.concatenate([c.scores for c in every]),
        )


@dataclass(frozen=True, eq=False)
class Moved:
    """Where the crown rows went when a path was walked."""

    to_trunk: NDArray[np.int64]
    """Rows of the walked path, in order, as far as it had rows; the new root's own row last, if it had one."""
    kept: NDArray[np.int64]
    """Rows below the new root, which are its first crown rows now, in order."""


@dataclass(eq=False)
class ExpandedTree:
    """Crown rows below the root, in the order they were computed.  `root` holds the root's own candidates."""

    root: CandidateNodes
    _row: dict[tuple[int, int], int] = field(default_factory=dict)
    """By parent's row and token."""
    _above: NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 0), np.bool_))
    """[rows, rows] and room for more: ancestors and self."""
    _found: list[CandidateNodes] = field(default_factory=list)
    """Of the crown rows, a piece a forward."""
    _joined: CandidateNodes | None = None

    def __len__(self) -> int:
        """Crown rows."""
        return len(self._row)

    def rows(self, parents: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each node, given its parent's; NO_ROW where it has none."""
        asked = zip(parents.tolist(), tokens.tolist(), strict=True)
        return np.array([self._row.get(node, NO_ROW) for node in asked], np.int64)

    def add(self, parents: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Give new nodes the next rows, below parents' rows.  Returns bool [new, rows]: the rows each of them sees,
        itself included; `learn` must follow."""
        old, count = len(self), len(self) + len(tokens)
        self._row.update(
            ((parent, token), old + i)
            for i, (parent, token) in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True))
        )
        if count > len(self._above):
            grown = np.zeros((2 * count, 2 * count), np.bool_)
            grown[: len(self._above), : len(self._above)] = self._above
            self._above = grown
        above = self._above[old:count, :count]
        above[:, :old] = self._above[np.maximum(parents, 0), :old]
        above[parents == NO_ROW] = False
        above[np.arange(len(tokens)), np.arange(old, count)] = True
        return above

    def learn(self, found: CandidateNodes) -> None:
        """The candidates of the rows added last."""
        self._found.append(found)
        self._joined = None

    def candidates(self) -> CandidateNodes:
        """The root's, then the crown rows' in order."""
        if self._joined is None:
            self._joined = self.root.with_more(self._found)
        return self._joined

    def rows_of(self, tree: DraftTree) -> NDArray[np.int64]:
        """The row of each node of a tree below this root; NO_ROW where it has none."""
        rows = tree.match(self._row)
        return np.where(rows == NO_NODE, NO_ROW, rows)

    def moved(self, path: Sequence[int], bonus: int) -> Moved:
        """What becomes of the rows when the text grows by `path` (tokens below the root) and `bonus`."""
        walked: list[int] = []
        for token in (*path, bonus):
            row = self._row.get((walked[-1] if walked else NO_ROW, token), NO_ROW)
            if row == NO_ROW:
                return Moved(np.array(walked, np.int64), np.empty(0, np.int64))
            walked.append(row)
        below = self._above[: len(self), walked[-1]].copy()
        below[walked[-1]] = False
        return Moved(np.array(walked), np.flatnonzero(below))

    def below(self, moved: Moved) -> "ExpandedTree":
        """What is left of this below a new root that had a row."""
        known = self.candidates()
        renumbered = np.full(len(self) + 1, NO_ROW)
        renumbered[moved.kept] = np.arange(len(moved.kept))
        kept = {
            (int(renumbered[parent]), token): int(renumbered[row])
            for (parent, token), row in self._row.items()
            if renumbered[row] != NO_ROW
        }
        return ExpandedTree(
            root=known.of(moved.to_trunk[-1:] + 1),
            _row=kept,
            _above=self._above[np.ix_(moved.kept, moved.kept)].copy(),
            _found=[known.of(moved.kept + 1)],
        )
