"""The rival of shared noise: trees sampled from the draft, made exact by rejection.  Pure.

A node's children are drawn from the draft one after another without replacement, and tried in that order:

    accept a child with chance min(1, target(child) / draft(child)); once it is rejected,
    target ← normalised max(target − draft, 0)        what the target wants that the draft did not offer
    draft  ← normalised draft without the child       what the next child was drawn from

and where none is left, the bonus is drawn from what remains of the target.  This is multi-step speculative sampling
(SpecInfer, arXiv 2305.09781, algorithm 2) for draws without replacement (recursive rejection sampling, arXiv
2402.14160; Sequoia, arXiv 2402.12374).  What a rejection leaves of the target depends neither on the child's token nor
on whether others follow, so a tree may decide by all that it has drawn where it draws next, and the text stays the
target's.  What it may not do is drop a child for what it turned out to be, nor choose children by rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.session.walk import Walk

Probs = NDArray[np.float64]
"""[vocab], summing to 1."""
ROOT = -1


@dataclass(frozen=True, eq=False)
class SampledTree:
    """Node i is `tokens[i]` below node `parents[i]` or the root, `parents[i] < i`; siblings in the order drawn."""

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    draft_probs: Mapping[int, Probs]
    """Of every node that has children: what the first of them was drawn from."""

    def children(self, node: int) -> list[int]:
        """In the order drawn."""
        return np.flatnonzero(self.parents == node).tolist()


@dataclass(frozen=True)
class Trial:
    """One child that the walk came to: what a shape may learn from."""

    rank: int
    """How many siblings were rejected before it."""
    draft_prob: float
    """What it was drawn with, after those before it were taken out."""
    accepted: bool


def draw_token(probs: Probs, random: np.random.Generator) -> int:
    """A token of positive probability."""
    mass = probs.cumsum()
    # Rounding may leave the last draws above all mass.
    place = int(mass.searchsorted(random.random() * mass[-1], side="right"))
    return place if place < len(probs) else int(np.flatnonzero(probs)[-1])


def without_token(draft_probs: Probs, token: int) -> Probs | None:
    """What the next child is drawn from once `token` was; None where nothing is left."""
    rest = draft_probs.copy()
    rest[token] = 0.0
    mass = rest.sum()
    return rest / mass if mass > 0.0 else None


@dataclass(frozen=True, eq=False)
class ChildOdds:
    """What may become of a node's children."""

    draft_probs: Sequence[float]
    """What each was drawn with, those before it taken out."""
    accepted: Sequence[float]
    """The chance of each, once those before it were rejected."""
    rest: Probs
    """What the bonus is drawn from once all were rejected."""


def child_odds(target_probs: Probs, draft_probs: Probs, children: Sequence[int]) -> ChildOdds:
    """The rule at one node: `children` are the tokens drawn from `draft_probs` without replacement, in order."""
    rest, left = target_probs, draft_probs
    drawn_with: list[float] = []
    accepted: list[float] = []
    for token in children:
        drawn_with.append(float(left[token]))
        accepted.append(min(1.0, float(rest[token] / left[token])))
        wanting = np.maximum(rest - left, 0.0)
        mass = wanting.sum()
        # No mass: the two are equal, and the child is accepted but for rounding.
        rest = wanting / mass if mass > 0.0 else rest
        remaining = without_token(left, token)
        if remaining is None:
            break
        left = remaining
    return ChildOdds(drawn_with, accepted, rest)


def walk_by_rejection(
    tree: SampledTree, target_probs: NDArray[np.float64], random: np.random.Generator
) -> tuple[Walk, list[Trial]]:
    """Walk a tree from the root.  `target_probs` is [nodes + 1, vocab]: after the root, then after each node."""
    path: list[int] = []
    trials: list[Trial] = []
    at = ROOT
    while True:
        children = tree.children(at)
        if not children:
            return Walk(tuple(path), draw_token(target_probs[at + 1], random)), trials
        found = child_odds(target_probs[at + 1], tree.draft_probs[at], tree.tokens[children].tolist())
        for rank, (child, chance) in enumerate(zip(children, found.accepted, strict=True)):
            accepted = random.random() < chance
            trials.append(Trial(rank, found.draft_probs[rank], accepted))
            if accepted:
                path.append(child)
                at = child
                break
        else:
            return Walk(tuple(path), draw_token(found.rest, random)), trials
