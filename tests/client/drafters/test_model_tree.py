"""Growth against a search that knows the whole tree."""

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
    """The best `width` children of any path, best first: tokens [width] and log-scores float32 [width]."""

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
    """Plays the draft: knows the path of every node it was shown, and checks how it is called."""

    def __init__(self, children: Children, growth: ModelTreeOptions) -> None:
        self.children, self.growth = children, growth
        self.paths: dict[int, Path] = {-1: ()}
        self.levels: list[int] = []

    def grow(self, size: int) -> DraftTree:
        tokens, scores = self.children(())
        return ModelTree(size, self.growth, tokens, scores).grow(self.expand)

    def expand(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert 0 < len(nodes) <= self.growth.beam
        for node, parent, token, level in zip(nodes, parents, tokens, depth, strict=True):
            assert int(node) not in self.paths, "a node was expanded twice"
            self.paths[int(node)] = (*self.paths[int(parent)], int(token))
            assert len(self.paths[int(node)]) == level < self.growth.depth
        self.levels.append(len(nodes))
        found = [self.children(self.paths[int(node)]) for node in nodes]
        return np.stack([f[0] for f in found]), np.stack([f[1] for f in found])


def whole_tree(children: Children, depth: int) -> dict[Path, np.float32]:
    """Every path down to `depth` with its cumulative score, summed as growth sums it."""
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
    places = np.arange(len(tree))
    assert ((tree.parents >= -1) & (tree.parents < places)).all()
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
def test_it_is_exactly_the_best_of_the_whole_tree_whatever_the_beam(
    seed: int, size: int, beam: int, width: int, depth: int, certain: bool, ends: bool
) -> None:
    children = toy_language(seed, width, certain=certain, ends=ends)
    everything = whole_tree(children, depth)
    best = sorted(everything, key=lambda path: -everything[path])[:size]
    tree = Model(children, ModelTreeOptions(beam=beam, width=width, depth=depth)).grow(size)
    check_invariants(tree)
    assert len(tree) == min(size, len(everything))
    found = dict(zip(paths_of(tree), tree.scores, strict=True))
    assert found == {path: everything[path] for path in best}


def test_it_grows_the_largest_tree_level_by_level() -> None:
    model = Model(toy_language(1, 32), ModelTreeOptions(beam=128, width=32, depth=48))
    tree = model.grow(2048)
    check_invariants(tree)
    assert len(tree) == 2048
    # A forward a level, and no more of them than a sensible draft can afford.
    assert len(model.levels) < 60


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_is_expanded_that_cannot_have_a_child_in_the_tree(size: int) -> None:
    model = Model(toy_language(3, 1), ModelTreeOptions(width=1))
    assert len(model.grow(size)) == size
    assert sum(model.levels) == size - 1


def test_a_width_of_one_is_a_chain() -> None:
    tree = Model(toy_language(5, 1), ModelTreeOptions(width=1, depth=12)).grow(12)
    assert tree.parents.tolist() == list(range(-1, 11))


def test_it_ends_with_what_it_has_once_it_is_enough() -> None:
    model = Model(toy_language(7, 3), ModelTreeOptions(width=3, depth=9))
    tokens, scores = model.children(())
    growing = ModelTree(40, model.growth, tokens, scores)
    tree = growing.grow(model.expand, lambda _: len(model.levels) == 2)
    check_invariants(tree)
    assert len(model.levels) == 2
    assert 3 < len(tree) < 40


def test_it_is_told_what_the_next_forward_promises() -> None:
    children = toy_language(9, 8)
    patient, asked = (Model(children, ModelTreeOptions(width=8, depth=9)) for _ in range(2))
    promises: list[float] = []

    def should_stop(promise: float) -> bool:
        promises.append(promise)
        return False

    tree = ModelTree(60, asked.growth, *children(())).grow(asked.expand, should_stop)
    assert paths_of(tree) == paths_of(patient.grow(60))
    assert len(asked.levels) == len(promises)
    assert all(0 < promise <= 1.0 + 1e-6 for promise in promises)


@given(scores=st.lists(st.floats(-12, 0), min_size=1, max_size=40), share=st.floats(0.01, 1.0))
def test_as_many_nodes_share_a_forward_as_bring_most_chance_a_second(scores: list[float], share: float) -> None:
    best_first = np.sort(np.array(scores, np.float32))[::-1]
    count = worth_a_forward(best_first, share)
    rates = [np.exp(best_first[:n].astype(float)).sum() / (1 + share * n) for n in range(1, len(scores) + 1)]
    assert rates[count - 1] == pytest.approx(max(rates))


def test_it_goes_on_where_it_was_stopped() -> None:
    children = toy_language(11, 8)
    model = Model(children, ModelTreeOptions(width=8, depth=9))
    growing = ModelTree(60, model.growth, *children(()))
    forwards = -1
    while forwards < len(model.levels):  # one at a time
        forwards = len(model.levels)
        tree = growing.grow(model.expand, lambda _, before=forwards: len(model.levels) > before)
    assert forwards > 3
    assert paths_of(tree) == paths_of(Model(children, model.growth).grow(60))


def test_what_is_known_costs_no_forward_and_is_not_refused() -> None:
    model = Model(toy_language(13, 3), ModelTreeOptions(width=3, depth=9))

    def known(parents: NDArray[np.int64], _tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        return parents < 0

    tree = ModelTree(40, model.growth, *model.children(())).grow(model.expand, lambda _: True, known)
    assert max(len(path) for path in paths_of(tree)) == 2


def test_scores_that_are_no_numbers_make_no_nodes() -> None:
    def expand(*_: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return np.zeros((1, 1), np.int64), np.full((1, 1), np.nan, np.float32)

    scores = np.array([-0.5, np.nan, -np.inf], np.float32)
    tree = ModelTree(8, ModelTreeOptions(), np.arange(3), scores).grow(expand)
    assert tree.tokens.tolist() == [0]
    assert len(ModelTree(8, ModelTreeOptions(), np.arange(1), scores[1:2]).grow(expand)) == 0


def test_rounding_above_one_lets_no_child_outrank_its_parent() -> None:
    def expand(nodes: NDArray[np.int64], *_: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return np.full((len(nodes), 1), 4), np.full((len(nodes), 1), 1e-6, np.float32)

    growing = ModelTree(6, ModelTreeOptions(depth=3), np.array([1, 2]), np.array([1e-7, -3.0], np.float32))
    tree = growing.grow(expand)
    check_invariants(tree)
    assert tree.tokens.tolist() == [1, 4, 4, 2, 4, 4]
