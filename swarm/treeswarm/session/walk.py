"""The acceptance rule: follow the target's own tokens through the tree until they leave it.

The target's token at every node is `argmax(log p̃ + gumbel)`, so a child either has that token or it does not.  Nothing
is drawn here, no draft probability is needed, and the text depends on the target alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Walk:
    """The result of a walk."""

    accepted: tuple[int, ...]
    """Indices of the accepted nodes, from the root down."""
    bonus: int
    """The target's token after the last of them, which is always kept."""


def child_index(parents: NDArray[np.integer], tokens: NDArray[np.integer]) -> dict[tuple[int, int], int]:
    """Return each node's index by its parent's index (-1 for the root) and its token."""
    pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
    return {(parent, token): node for node, (parent, token) in enumerate(pairs)}


def walk(parents: NDArray[np.integer], tokens: NDArray[np.integer], answers: NDArray[np.integer]) -> Walk:
    """Walk a drafted tree of n nodes below a root.

    `parents` [n] holds node indices, or -1 for the root, and `tokens` [n] the nodes' tokens; siblings must differ.
    `answers` [n + 1] holds the target's token after the root, then after each node.
    """
    children = child_index(parents, tokens)
    accepted: list[int] = []
    node = -1
    while (child := children.get((node, int(answers[node + 1])))) is not None:
        accepted.append(child)
        node = child
    return Walk(tuple(accepted), int(answers[node + 1]))
