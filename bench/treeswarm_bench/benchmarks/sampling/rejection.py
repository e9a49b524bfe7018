"""The alternative to shared noise: trees sampled from the draft, made exact by rejection.  Pure computation.

A node's children are drawn from the draft one after another without replacement, and tried in that order:

    accept a child with chance min(1, target(child) / draft(child)); once it is rejected,
    target ← normalised max(target − draft, 0)        the part of the target that the draft did not offer
    draft  ← normalised draft without the child       what the next child was drawn from

When no child is left, the bonus token is drawn from what remains of the target.  This is multi-step speculative
sampling (SpecInfer, arXiv 2305.09781, algorithm 2) for draws without replacement (recursive rejection sampling, arXiv
2402.14160; Sequoia, arXiv 2402.12374).  What a rejection leaves of the target depends neither on the child's token nor
on whether other children follow.  So a tree may use all that it has drawn to decide where it draws next, and the text
stays the target's.  A tree may not drop a child because of its token, nor choose children by rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.session.walk import Walk

Probs = NDArray[np.float64]
"""Probabilities of tokens, float64 [vocab], which sum to 1."""
ROOT = -1


@dataclass(frozen=True, eq=False)
class SampledTree:
    """A tree sampled from a draft.

    Node i has the token `tokens[i]`, below node `parents[i]` or the root; `parents[i] < i`.  Siblings stand in the
    order in which they were drawn.
    """

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    draft_probs: Mapping[int, Probs]
    """Distribution that the first child was drawn from, by node, for every node that has children."""

    def children(self, node: int) -> list[int]:
        """Return a node's children in the order in which they were drawn."""
        return np.flatnonzero(self.parents == node).tolist()


@dataclass(frozen=True)
class Trial:
    """One child that the walk tried, from which a shape may learn."""

    rank: int
    """Number of siblings that were rejected before it."""
    draft_prob: float
    """Probability that it was drawn with, after the siblings before it were taken out."""
    accepted: bool


def draw_token(probs: Probs, random: np.random.Generator) -> int:
    """Draw a token, which has a positive probability."""
    mass = probs.cumsum()
    # Rounding may leave the last draws above all mass.
    token = int(mass.searchsorted(random.random() * mass[-1], side="right"))
    return token if token < len(probs) else int(np.flatnonzero(probs)[-1])


def without_token(draft_probs: Probs, token: int) -> Probs | None:
    """Return the distribution of the next child once `token` was drawn, or None if nothing is left."""
    rest = draft_probs.copy()
    rest[token] = 0.0
    mass = rest.sum()
    return rest / mass if mass > 0.0 else None


@dataclass(frozen=True, eq=False)
class ChildOdds:
    """Probabilities of what may become of a node's children."""

    draft_probs: Sequence[float]
    """Probability that each child was drawn with, after the siblings before it were taken out."""
    accepted: Sequence[float]
    """Chance of each child to be accepted, once the siblings before it were rejected."""
    rest: Probs
    """Distribution of the bonus token once all children were rejected."""


def child_odds(target_probs: Probs, draft_probs: Probs, children: Sequence[int]) -> ChildOdds:
    """Apply the rule at one node; `children` are the tokens drawn from `draft_probs` without replacement, in order."""
    rest, left = target_probs, draft_probs
    drawn_with: list[float] = []
    accepted: list[float] = []
    for token in children:
        drawn_with.append(float(left[token]))
        accepted.append(min(1.0, float(rest[token] / left[token])))
        excess = np.maximum(rest - left, 0.0)
        mass = excess.sum()
        # Without mass the two distributions are equal, and the child is accepted but for rounding.
        rest = excess / mass if mass > 0.0 else rest
        remaining = without_token(left, token)
        if remaining is None:
            break
        left = remaining
    return ChildOdds(drawn_with, accepted, rest)


def walk_by_rejection(
    tree: SampledTree, target_probs: NDArray[np.float64], random: np.random.Generator
) -> tuple[Walk, list[Trial]]:
    """Walk a tree from the root; return the walk and the children tried.

    `target_probs` is float64 [nodes + 1, vocab]: the distribution after the root, then after each node.
    """
    path: list[int] = []
    trials: list[Trial] = []
    at = ROOT
    while True:
        children = tree.children(at)
        if not children:
            return Walk(tuple(path), draw_token(target_probs[at + 1], random)), trials
        odds = child_odds(target_probs[at + 1], tree.draft_probs[at], tree.tokens[children].tolist())
        for rank, (child, chance) in enumerate(zip(children, odds.accepted, strict=True)):
            accepted = random.random() < chance
            trials.append(Trial(rank, odds.draft_probs[rank], accepted))
            if accepted:
                path.append(child)
                at = child
                break
        else:
            return Walk(tuple(path), draw_token(odds.rest, random)), trials
