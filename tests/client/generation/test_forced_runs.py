"""Trees under a grammar: what must follow, what is excluded, and what drafters see of it."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from treeswarm.errors import Malformed
from treeswarm.session.walk import Walk, walk
from treeswarm_client.drafters.seam import NO_TREE, DraftTree, Verification
from treeswarm_client.generation.forced_runs import (
    after_run,
    below_run,
    check_tokens,
    obedient_tree,
    verification_after_run,
    walk_after_run,
)

TEXTS = ["abcd", "abxd", "ezzzz!", "ezz?"]


class Texts:
    """The grammar of a few texts: token t is a letter."""

    def after(self, text: Sequence[int], branches: Sequence[Sequence[int]]) -> NDArray[np.uint32]:
        masks = np.zeros((len(branches), 4), np.uint32)
        for row, branch in enumerate(branches):
            for token in self._next([*text, *branch]):
                masks[row, token // 32] |= np.uint32(1 << token % 32)
        return masks

    def forced_run(self, text: Sequence[int], most: int) -> list[int]:
        run: list[int] = []
        while len(run) < most and len(following := self._next([*text, *run])) == 1:
            run += following
        return run

    def follows(self, text: Sequence[int], tokens: Sequence[int]) -> int:
        return next((i for i, t in enumerate(tokens) if t not in self._next([*text, *tokens[:i]])), len(tokens))

    def _next(self, path: Sequence[int]) -> set[int]:
        written = "".join(map(chr, path))
        return {ord(each[len(written)]) for each in TEXTS if each.startswith(written) and len(each) > len(written)}


def tree(*nodes: tuple[int, str, float]) -> DraftTree:
    """Return the tree of nodes, each as its parent, its letter and its score."""
    parents, letters, scores = zip(*nodes, strict=True) if nodes else ((), (), ())
    return DraftTree(
        np.array(parents, np.int64), np.array(list(map(ord, letters)), np.int64), np.array(scores, np.float32)
    )


def words(tree: DraftTree) -> dict[str, float]:
    """Return the score of every path, as a text."""
    paths = [""]
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append(paths[parent + 1] + chr(token))
    return dict(zip(paths[1:], tree.scores.tolist(), strict=True))


def ids(text: str) -> list[int]:
    return list(map(ord, text))


def test_excluded_nodes_are_cut_with_all_below_them() -> None:
    drafted = tree((-1, "q", -0.1), (0, "b", -0.2), (-1, "a", -0.5), (2, "z", -1.0), (2, "b", -1.5))
    assert words(obedient_tree(Texts(), [], drafted, 2)) == {"a": -0.5, "ab": -0.5}


def test_nodes_that_must_follow_are_as_likely_as_those_before() -> None:
    obedient = obedient_tree(Texts(), [], tree((-1, "e", -0.5), (-1, "a", -1.0), (1, "b", -3.0)), 9)
    assert list(words(obedient).items()) == [("e", -0.5), ("ez", -0.5), ("ezz", -0.5), ("a", -1.0), ("ab", -1.0)]
    assert (np.diff(obedient.scores) <= 0).all()


def test_new_nodes_keep_to_depth_and_number() -> None:
    assert words(obedient_tree(Texts(), [], tree((-1, "e", -0.5)), 2)) == {"e": -0.5, "ez": -0.5}
    assert words(obedient_tree(Texts(), ids("e"), tree((-1, "z", -0.5)), 9)) == {"z": -0.5, "zz": -0.5}
    assert len(obedient_tree(Texts(), [], NO_TREE, 9)) == 0


def test_tree_goes_on_below_a_run() -> None:
    drafted = tree((-1, "c", -0.5), (-1, "x", -1.0), (0, "d", -1.0))
    whole = below_run(ids("ab"), drafted)
    assert words(whole) == {"a": 0.0, "ab": 0.0, "abc": -0.5, "abx": -1.0, "abcd": -1.0}
    assert words(after_run(ids("ab"), whole)) == words(drafted)
    assert below_run([], drafted) is drafted
    assert after_run([], drafted) is drafted
    assert len(after_run(ids("b"), whole)) == 0
    assert words(after_run(ids("abcd"), whole)) == {}


def test_drafter_learns_what_is_below_the_run() -> None:
    drafted = tree((-1, "c", -0.5), (-1, "x", -1.0), (0, "d", -1.0))
    whole, answers = below_run(ids("ab"), drafted), np.array(ids("abcdqr"))
    path = walk(whole.parents, whole.tokens, answers)
    seen = verification_after_run(ids("ab"), Verification(whole, answers, path.accepted, path.bonus))
    assert words(seen.tree) == words(drafted)
    assert seen.answers.tolist() == ids("cdqr")
    assert Walk(tuple(seen.accepted), seen.bonus) == walk(drafted.parents, drafted.tokens, seen.answers)
    assert walk_after_run(ids("ab"), path) == Walk(tuple(seen.accepted), seen.bonus)


def test_walk_that_ends_in_the_run_has_nothing_below_it() -> None:
    assert walk_after_run(ids("abc"), Walk((0,), 5)) == Walk((), 5)


def test_tokens_that_the_grammar_excludes_are_a_fault_of_the_tail() -> None:
    check_tokens(Texts(), ids("a"), ids("bx"))
    with pytest.raises(Malformed, match=f"the tail chose token {ord('q')}, which the grammar"):
        check_tokens(Texts(), ids("a"), ids("bq"))
