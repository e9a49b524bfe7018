"""Rounds of a generation as a test writes them."""

from collections.abc import Sequence

import numpy as np

from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.planner.policy import Round


def decode(tokens: Sequence[int]) -> str:
    """Decode as sentencepiece does, without a space before the first word."""
    return " ".join(f"w{token}" for token in tokens)


def make_round(parents: Sequence[int], accepted: Sequence[int] = (), first: int | None = None) -> Round:
    tree = DraftTree(
        np.array(parents, np.int64), np.arange(len(parents)), -np.arange(1, len(parents) + 1, dtype=np.float32)
    )
    return Round(
        tree, Walk(tuple(accepted), 99), len(parents), len(parents) if first is None else first, 0.05, 0.05, (), True
    )
