"""A walk accepts exactly the tokens that plain decoding would have generated."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.session.walk import Walk, walk


def target(context: tuple[int, ...]) -> int:
    """Return the next token of a toy target: any function of the context would do."""
    return (sum((i + 1) * t for i, t in enumerate(context)) * 7 + len(context)) % 3


@given(parents=st.lists(st.integers(-1, 40), max_size=40), tokens=st.lists(st.integers(0, 2), min_size=40, max_size=40))
def test_a_walk_accepts_what_plain_decoding_generates(parents: list[int], tokens: list[int]) -> None:
    tree: list[tuple[int, int]] = []
    for i, parent in enumerate(parents):
        node = (min(parent, len(tree) - 1), tokens[i])
        if node not in tree:
            tree.append(node)
    contexts = [(0,)]
    for parent, token in tree:
        contexts.append((*contexts[parent + 1], token))
    answers = np.array([target(context) for context in contexts])
    walked = walk(np.array([p for p, _ in tree]), np.array([t for _, t in tree]), answers)
    text: tuple[int, ...] = (0,)
    for node in walked.accepted:
        assert target(text) == tree[node][1]
        text = (*text, tree[node][1])
        assert text == contexts[node + 1]
    assert walked.bonus == target(text)
    assert (*text, walked.bonus) not in contexts


def test_without_a_tree_the_walk_is_the_bonus_alone() -> None:
    assert walk(np.empty(0, int), np.empty(0, int), np.array([5])) == Walk((), 5)
