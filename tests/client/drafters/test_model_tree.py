"""`ModelTree` agrees with a search that knows the whole tree."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.client.drafters.conftest import paths_of

from treeswarm_client.drafters.model_tree import ModelTree, ModelTreeOptions, worth_a_forward
from treeswarm_client.drafters.seam import DraftTree

Path = tuple[int, ...]
Children = Callable[[Path], tuple[NDArray[np.int64], NDArray[np.float32]]]


def toy_language(seed: int, width: int, *, certain: bool = False, ends: bool = False) -> Children:
    """Return a function that gives the best children of a path: tokens [width] and log-scores float32 [width]."""

    def children(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rng = np.random.default_rng([seed, len(path), *path])
        logits = rng.normal(size=width + 3) * (8.0 if certain else 1.5)
        scores = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        best = np.argsort(-scores)[:width]
        kept = scores[best]
        if ends and rng.random() < 0.3:
            kept[len(kept) // 2 :] = -np.inf
        return best, kept

    return children


class Model:
    """A stand-in for the draft model that knows the path of every node and checks how it is called."""

    def __init__(self, children: Children, options: ModelTreeOptions) -> None:
        self.children, self.options = children, options
        self.paths: dict[int, Path] = {-1: ()}
        self.levels: list[int] = []

    def grow(self, size: int) -> DraftTree:
        tokens, scores = self.children(())
        return ModelTree(size, self.options, tokens, scores).grow(self.expand)

    def expand(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert 0 < len(nodes) <= self.options.beam
        for node, parent, token, level in zip(nodes, parents, tokens, depth, strict=True):
            assert int(node) not in self.paths, "a node was expanded twice"
            self.paths[int(node)] = (*self.paths[int(parent)], int(token))
            assert len(self.paths[int(node)]) == level < self.options.depth
        self.levels.append(len(nodes))
        below = [self.children(self.paths[int(node)]) for node in nodes]
        return np.stack([tokens for tokens, _ in below]), np.stack([scores for _, scores in below])


def whole_tree(children: Children, depth: int) -> dict[Path, np.float32]:
    """Return the cumulative score of every path down to `depth`, summed in the order of `ModelTree`."""
    scores: dict[Path, np.float32] = {}
    frontier: list[tuple[Path, np.float32]] = [((), np.float32(0))]
    for _ in range(depth):
        below = []
        for path, score in frontier:
            for token, own in zip(*children(path), strict=True):
                if np.isfinite(own):
                    below.append(((*path, int(token)), np.float32(score + own)))
        scores.update(below)
        frontier = below
    return scores


def check_invariants(tree: DraftTree) -> None:
    nodes = np.arange(len(tree))
    assert ((tree.parents >= -1) & (tree.parents < nodes)).all()
    assert (np.diff(tree.scores) <= 0).all()
    assert len(set(paths_of(tree))) == len(tree)


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 80),
    beam=st.integers(1, 100),
    width=st.integers(1, 4),
    depth=st.integers(1, 4),
    certain=st.booleans(),
    ends=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_it_has_exactly_the_best_nodes_whatever_the_beam(
    seed: int, size: int, beam: int, width: int, depth: int, certain: bool, ends: bool
) -> None:
    children = toy_language(seed, width, certain=certain, ends=ends)
    everything = whole_tree(children, depth)
    best = sorted(everything, key=lambda path: -everything[path])[:size]
    tree = Model(children, ModelTreeOptions(beam=beam, width=width, depth=depth)).grow(size)
    check_invariants(tree)
    assert len(tree) == min(size, len(everything))
    scores = dict(zip(paths_of(tree), tree.scores, strict=True))
    assert scores == {path: everything[path] for path in best}


def test_the_largest_tree_takes_less_than_60_forwards() -> None:
    model = Model(toy_language(1, 32), ModelTreeOptions(beam=128, width=32, depth=48))
    tree = model.grow(2048)
    check_invariants(tree)
    assert len(tree) == 2048
    # Each level takes a forward, and there are no more of them than a draft can afford.
    assert len(model.levels) < 60


@pytest.mark.parametrize("size", [1, 2])
def test_nodes_without_a_child_in_the_tree_are_not_expanded(size: int) -> None:
    model = Model(toy_language(3, 1), ModelTreeOptions(width=1))
    assert len(model.grow(size)) == size
    assert sum(model.levels) == size - 1


def test_a_width_of_one_is_a_chain() -> None:
    tree = Model(toy_language(5, 1), ModelTreeOptions(width=1, depth=12)).grow(12)
    assert tree.parents.tolist() == list(range(-1, 11))


def test_it_stops_with_the_nodes_it_has() -> None:
    model = Model(toy_language(7, 3), ModelTreeOptions(width=3, depth=9))
    tokens, scores = model.children(())
    model_tree = ModelTree(40, model.options, tokens, scores)
    tree = model_tree.grow(model.expand, lambda _: len(model.levels) == 2)
    check_invariants(tree)
    assert len(model.levels) == 2
    assert 3 < len(tree) < 40


def test_should_stop_is_given_the_chance_of_each_forward() -> None:
    children = toy_language(9, 8)
    unasked, asked = (Model(children, ModelTreeOptions(width=8, depth=9)) for _ in range(2))
    chances: list[float] = []

    def should_stop(chance: float) -> bool:
        chances.append(chance)
        return False

    tree = ModelTree(60, asked.options, *children(())).grow(asked.expand, should_stop)
    assert paths_of(tree) == paths_of(unasked.grow(60))
    assert len(asked.levels) == len(chances)
    assert all(0 < chance <= 1.0 + 1e-6 for chance in chances)


@given(scores=st.lists(st.floats(-12, 0), min_size=1, max_size=40), share=st.floats(0.01, 1.0))
def test_the_size_of_a_forward_has_the_best_rate(scores: list[float], share: float) -> None:
    best_first = np.sort(np.array(scores, np.float32))[::-1]
    count = worth_a_forward(best_first, share)
    rates = [np.exp(best_first[:n].astype(float)).sum() / (1 + share * n) for n in range(1, len(scores) + 1)]
    assert rates[count - 1] == pytest.approx(max(rates))


def test_it_continues_where_it_was_stopped() -> None:
    children = toy_language(11, 8)
    model = Model(children, ModelTreeOptions(width=8, depth=9))
    model_tree = ModelTree(60, model.options, *children(()))
    forwards = -1
    while forwards < len(model.levels):  # one forward at a time
        forwards = len(model.levels)
        tree = model_tree.grow(model.expand, lambda _, before=forwards: len(model.levels) > before)
    assert forwards > 3
    assert paths_of(tree) == paths_of(Model(children, model.options).grow(60))


def test_free_nodes_are_expanded_even_when_told_to_stop() -> None:
    model = Model(toy_language(13, 3), ModelTreeOptions(width=3, depth=9))

    def is_free(parents: NDArray[np.int64], _tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        return parents < 0

    tree = ModelTree(40, model.options, *model.children(())).grow(model.expand, lambda _: True, is_free)
    assert max(len(path) for path in paths_of(tree)) == 2


def test_scores_that_are_not_finite_make_no_nodes() -> None:
    def expand(*_: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return np.zeros((1, 1), np.int64), np.full((1, 1), np.nan, np.float32)

    scores = np.array([-0.5, np.nan, -np.inf], np.float32)
    tree = ModelTree(8, ModelTreeOptions(), np.arange(3), scores).grow(expand)
    assert tree.tokens.tolist() == [0]
    assert len(ModelTree(8, ModelTreeOptions(), np.arange(1), scores[1:2]).grow(expand)) == 0


def test_rounding_lets_no_child_outrank_its_parent() -> None:
    def expand(nodes: NDArray[np.int64], *_: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return np.full((len(nodes), 1), 4), np.full((len(nodes), 1), 1e-6, np.float32)

    model_tree = ModelTree(6, ModelTreeOptions(depth=3), np.array([1, 2]), np.array([1e-7, -3.0], np.float32))
    tree = model_tree.grow(expand)
    check_invariants(tree)
    assert tree.tokens.tolist() == [1, 4, 4, 2, 4, 4]
