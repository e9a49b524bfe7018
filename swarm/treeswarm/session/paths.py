"""Paths: the texts that end with some nodes of a tree, as rules, grammars and drafts read them.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

END = -1
"""Stands for the end of the text in arrays of nodes."""


@dataclass(frozen=True, eq=False)
class RowPaths:
    """A text that n rows have in common, and the nodes of a tree below it that each of them passes."""

    text: Sequence[int]
    """Tokens, of which the first `length` belong to every path.  It may grow meanwhile, and never changes."""
    length: int
    parents: NDArray[np.int64]
    """Index of each node's parent, or END, int64 [nodes]."""
    tokens: NDArray[np.int64]
    """Token of each node, int64 [nodes]."""
    rows: NDArray[np.int64]
    """Node at which each row's path ends, or END, int64 [n]."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def select(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> "RowPaths":
        """Return the paths of some of the rows."""
        return replace(self, rows=self.rows[rows])

    def below(self) -> list[list[int]]:
        """Return the tokens of each row's path after the common text, in order."""
        parents, tokens = self.parents.tolist(), self.tokens.tolist()
        found: dict[int, list[int]] = {END: []}

        def path(node: int) -> list[int]:
            climbed: list[int] = []
            while node not in found:
                climbed.append(node)
                node = parents[node]
            for step in reversed(climbed):
                found[step] = [*found[node], tokens[step]]
                node = step
            return found[node]

        return [path(node) for node in self.rows.tolist()]

    def whole(self) -> list[list[int]]:
        """Return the tokens of each row's path from the beginning of the text."""
        text = list(self.text[: self.length])
        return [text + below for below in self.below()]


def paths_at_end(text: Sequence[int]) -> RowPaths:
    """Return the path of one row that ends with a text."""
    none = np.empty(0, np.int64)
    return RowPaths(text, len(text), none, none, np.array([END]))
