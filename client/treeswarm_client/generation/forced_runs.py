"""Drafting under a grammar: tokens that must follow travel as certain nodes, and no other token is guessed in vain.

A forced run is the tokens that must follow a text because the grammar allows no other.  It stands between the bonus
token and the drafted tree, and drafters draft below its end, as if the target had chosen it already.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import Malformed
from treeswarm.grammar.bits import has_token, only_token
from treeswarm.session.grammars import GrammarPaths
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import NO_NODE, NO_TREE, DraftTree, Verification

Path = tuple[int, ...]
"""Tokens from below a root down to a node."""

# Most nodes of a forced run, for which every hop reserves room beside the drafted tree.  The longest run of the
# benchmark's 100 schemas has 38 tokens, and what is left of a longer one is the next round's run.
LONGEST_RUN = 64


class TextGrammar(GrammarPaths, Protocol):
    """A grammar as one text and the trees below it follow it; `treeswarm.grammar.masks.TextMasks` is one.

    A text is what was generated so far, without the prompt.  Raises BadRequest where the grammar cannot go on.
    """

    def after(self, text: Sequence[int], branches: Sequence[Sequence[int]]) -> NDArray[np.uint32]:
        """Return the masks after each branch below a text, uint32 [branches, words]."""
        ...

    def forced_run(self, text: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that must follow a text."""
        ...

    def follows(self, text: Sequence[int], tokens: Sequence[int]) -> int:
        """Return how many of `tokens` are allowed one after the other below a text."""
        ...


def check_tokens(grammar: TextGrammar, text: Sequence[int], tokens: Sequence[int]) -> None:
    """Raise Malformed if the tail chose tokens that the grammar does not allow after a text."""
    if (taken := grammar.follows(text, tokens)) < len(tokens):
        raise Malformed(f"the tail chose token {tokens[taken]}, which the grammar of this request does not allow there")


def obedient_tree(grammar: TextGrammar, text: Sequence[int], tree: DraftTree, depth: int) -> DraftTree:
    """Return a drafted tree without the nodes that the grammar excludes, and with those that must follow a node.

    What must follow is as likely as the node before it.  The tree has at most `depth` levels, and at most as many new
    nodes as it had, below the likeliest first.
    """
    paths: list[Path] = [()]
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append((*paths[parent + 1], token))
    masks = grammar.after(text, paths)
    scores: dict[Path, float] = {}
    for path, parent, score in zip(paths[1:], tree.parents.tolist(), tree.scores.tolist(), strict=True):
        if has_token(masks[parent + 1], path[-1]) and (parent < 0 or path[:-1] in scores):
            scores[path] = score
    most = len(scores) + len(tree)
    for path, mask in zip(paths[1:], masks[1:], strict=True):
        if path in scores and only_token(mask) is not None:
            run = grammar.forced_run([*text, *path], min(depth - len(path), most - len(scores)))
            for length in range(1, len(run) + 1):
                forced = (*path, *run[:length])
                scores[forced] = max(scores.get(forced, -np.inf), scores[path])
    return _tree_of(scores)


def _tree_of(scores: dict[Path, float]) -> DraftTree:
    """Return the tree of these paths, the likeliest first; each one's beginning must be among them, and as likely."""
    ranked = sorted(scores, key=lambda path: (-scores[path], len(path)))
    place = {path: node for node, path in enumerate(ranked)} | {(): -1}
    return DraftTree(
        np.array([place[path[:-1]] for path in ranked], np.int64),
        np.array([path[-1] for path in ranked], np.int64),
        np.array([scores[path] for path in ranked], np.float32),
    )


def below_run(run: Sequence[int], tree: DraftTree) -> DraftTree:
    """Return the tree that begins with a run, node below node, and goes on with `tree` below its end."""
    size = len(run)
    if not size:
        return tree
    return DraftTree(
        np.concatenate([np.arange(size) - 1, tree.parents + size]),
        np.concatenate([np.array(run, np.int64), tree.tokens]),
        np.concatenate([np.zeros(size, np.float32), tree.scores]),
    )


def after_run(run: Sequence[int], tree: DraftTree) -> DraftTree:
    """Return the part of a tree that is below the end of a run, or no tree if the tree does not have the run."""
    node = -1
    for token in run:
        node = tree.index.get((node, token), NO_NODE)
        if node == NO_NODE:
            return NO_TREE
    if node < 0:
        return tree
    place = {node: -1}
    kept: list[int] = []
    for child, parent in enumerate(tree.parents.tolist()):
        if parent in place:
            place[child] = len(kept)
            kept.append(child)
    parents = np.array([place[parent] for parent in tree.parents[kept].tolist()], np.int64)
    scores = tree.scores[kept] - tree.scores[node]
    return DraftTree(parents, tree.tokens[kept], scores)


def walk_after_run(run: Sequence[int], walk: Walk) -> Walk:
    """Return the part of a walk that is below the end of a run, as indices of the tree there."""
    size = len(run)
    return Walk(tuple(node - size for node in walk.accepted if node >= size), walk.bonus)


def verification_after_run(run: Sequence[int], verification: Verification) -> Verification:
    """Return what a drafter that drafted below the end of a run may learn."""
    size = len(run)
    if not size:
        return verification
    alternatives = verification.alternatives
    tree = verification.tree
    return Verification(
        DraftTree(np.maximum(tree.parents[size:] - size, -1), tree.tokens[size:], tree.scores[size:]),
        verification.answers[size:],
        tuple(node - size for node in verification.accepted if node >= size),
        verification.bonus,
        alternatives[size:] if len(alternatives) else alternatives,
    )


def as_verification(token: int) -> Verification:
    """Return the answer that a drafter observes for a token that is certain: nothing was drafted."""
    return Verification(NO_TREE, np.array([token], np.int64), (), token)
