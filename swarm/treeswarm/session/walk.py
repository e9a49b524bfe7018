"""The acceptance rule: follow the target's own tokens through the tree until it leaves it.

The target's token at every node is `argmax(log p̃ + gumbel)`, so a child is right or it is not: nothing is
drawn here, no draft probability is needed, and the text depends on the target alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Walk:
    """`accepted`: node indices from the root down.  `bonus`: the target's token after the last of them, always kept."""

    accepted: tuple[int, ...]
    bonus: int


def child_index(parents: NDArray[np.integer], tokens: NDArray[np.integer]) -> dict[tuple[int, int], int]:
    """Return each node's index by its parent's index (-1 for the root) and its token."""
    pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
    return {(parent, token): node for node, (parent, token) in enumerate(pairs)}


def walk(parents: NDArray[np.integer], tokens: NDArray[np.integer], answers: NDArray[np.integer]) -> Walk:
    """Walk a drafted tree below a root.

    `parents[i]` is a node index or -1 for the root; `answers[0]` is the target's token after the root and
    `answers[i + 1]` after node i.  Siblings must differ.
    """
    children = child_index(parents, tokens)
    accepted: list[int] = []
    at = -1
    while (child := children.get((at, int(answers[at + 1])))) is not None:
        accepted.append(child)
        at = child
    return Walk(tuple(accepted), int(answers[at + 1]))
