"""The part of a draft tree that a draft model has computed below its root; it outlives a round.

Each computed node has a row in the crown of the draft's KV cache.  It is found by its parent's row and its token.  A
growing tree may therefore ask again and again, also for larger trees and below a new root, and only new nodes cost a
forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.seam import NO_NODE, DraftTree

NO_ROW = -1
"""Value in arrays of rows for the root, which is above all crown rows, and for a node that has no row."""


@dataclass(frozen=True, eq=False)
class CandidateNodes:
    """The best next tokens of n nodes, m for each."""

    tokens: NDArray[np.int64]
    """Token ids, [n, m], best first."""
    raw_scores: NDArray[np.float32]
    """Scores before τ, [n, m]."""
    scores: NDArray[np.float32]
    """Conditional log-scores, [n, m]."""

    def select(self, nodes: NDArray[np.int64]) -> "CandidateNodes":
        """Return the candidates of some of the nodes."""
        return CandidateNodes(self.tokens[nodes], self.raw_scores[nodes], self.scores[nodes])

    def followed_by(self, others: Sequence["CandidateNodes"]) -> "CandidateNodes":
        """Return these candidates and, after them, those of `others`."""
        tables = (self, *others)
        return CandidateNodes(
            np.concatenate([table.tokens for table in tables]),
            np.concatenate([table.raw_scores for table in tables]),
            np.concatenate([table.scores for table in tables]),
        )


@dataclass(frozen=True, eq=False)
class RowMoves:
    """Where the crown rows go when a path has been walked."""

    to_trunk: NDArray[np.int64]
    """Rows of the walked path, in order, as far as it has rows.  The new root's own row is the last, if it has one."""
    kept: NDArray[np.int64]
    """Rows below the new root, in order: they become its first crown rows."""


@dataclass(eq=False)
class ExpandedTree:
    """Crown rows below the root, in the order in which they were computed."""

    root: CandidateNodes
    """Candidates of the root itself, [1, m]."""
    _row: dict[tuple[int, int], int] = field(default_factory=dict)
    """Row of each node, by its parent's row and its token."""
    _above: NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 0), np.bool_))
    """Rows of each row's ancestors and itself, bool [rows, rows], with room for more."""
    _candidates: list[CandidateNodes] = field(default_factory=list)
    """Candidates of the crown rows, one entry per forward."""
    _joined: CandidateNodes | None = None

    def __len__(self) -> int:
        """Return the number of crown rows."""
        return len(self._row)

    @property
    def nodes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parent's row and token of each crown row, int64 [rows] each."""
        pairs = np.array(list(self._row), np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def rows(self, parents: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each node, given its parent's row and its token; NO_ROW where it has none."""
        nodes = zip(parents.tolist(), tokens.tolist(), strict=True)
        return np.array([self._row.get(node, NO_ROW) for node in nodes], np.int64)

    def add(self, parents: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Give new nodes the next rows, below their parents' rows; `add_candidates` must follow.

        Returns bool [new, rows]: the rows that each of them sees, itself included.
        """
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

    def add_candidates(self, candidates: CandidateNodes) -> None:
        """Store the candidates of the rows that were added last."""
        self._candidates.append(candidates)
        self._joined = None

    def candidates(self) -> CandidateNodes:
        """Return the candidates of the root and, after them, those of the crown rows in order, [1 + rows, m]."""
        if self._joined is None:
            self._joined = self.root.followed_by(self._candidates)
        return self._joined

    def rows_of(self, tree: DraftTree) -> NDArray[np.int64]:
        """Return the row of each node of a tree below this root; NO_ROW where it has none."""
        rows = tree.match(self._row)
        return np.where(rows == NO_NODE, NO_ROW, rows)

    def row_moves(self, path: Sequence[int], bonus: int) -> RowMoves:
        """Return where the rows go when the text grows by `path` (tokens below the root) and `bonus`."""
        walked: list[int] = []
        for token in (*path, bonus):
            row = self._row.get((walked[-1] if walked else NO_ROW, token), NO_ROW)
            if row == NO_ROW:
                return RowMoves(np.array(walked, np.int64), np.empty(0, np.int64))
            walked.append(row)
        below = self._above[: len(self), walked[-1]].copy()
        below[walked[-1]] = False
        return RowMoves(np.array(walked), np.flatnonzero(below))

    def rerooted(self, moves: RowMoves) -> "ExpandedTree":
        """Return what is left of this tree below a new root that had a row."""
        candidates = self.candidates()
        renumbered = np.full(len(self) + 1, NO_ROW)
        renumbered[moves.kept] = np.arange(len(moves.kept))
        kept = {
            (int(renumbered[parent]), token): int(renumbered[row])
            for (parent, token), row in self._row.items()
            if renumbered[row] != NO_ROW
        }
        return ExpandedTree(
            root=candidates.select(moves.to_trunk[-1:] + 1),
            _row=kept,
            _above=self._above[np.ix_(moves.kept, moves.kept)].copy(),
            _candidates=[candidates.select(moves.kept + 1)],
        )
