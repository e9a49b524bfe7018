"""Trees sampled from a draft and verified by rejection: the text is the target's, and trees have size and shape."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from treeswarm_bench.benchmarks.sampling.rejection import (
    ROOT,
    Probs,
    SampledTree,
    Trial,
    child_odds,
    draw_token,
    walk_by_rejection,
    without_token,
)
from treeswarm_bench.benchmarks.sampling.sampled_trees import BestFirstShape, Shape, StaticShape

VOCAB = 4
weights = st.lists(st.integers(0, 20), min_size=VOCAB, max_size=VOCAB).filter(any)
SHAPES = [StaticShape(), BestFirstShape()]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=["static", "best-first"])


def normalise(weights: Sequence[float]) -> Probs:
    return np.array(weights, np.float64) / sum(weights)


@given(weights, weights, st.integers(0, VOCAB))
def test_token_of_one_node_is_distributed_as_the_targets(target: list[int], draft: list[int], children: int) -> None:
    """Every way in which its children can be drawn is counted."""
    target_probs, draft_probs = normalise(target), normalise(draft)
    chances = np.zeros(VOCAB)
    offered = np.flatnonzero(draft_probs).tolist()
    for drawn in permutations(offered, min(children, len(offered))):
        odds = child_odds(target_probs, draft_probs, drawn)
        here = float(np.prod(odds.draft_probs))
        for token, chance in zip(drawn, odds.accepted, strict=True):
            chances[token] += here * chance
            here *= 1.0 - chance
        chances += here * odds.rest
    np.testing.assert_allclose(chances, target_probs, atol=1e-12)


@given(weights, st.integers(0, 2**32))
def test_each_possible_token_is_drawn_once(drawn_from: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    left: Probs | None = normalise(drawn_from)
    drawn = []
    while left is not None:
        token = draw_token(left, random)
        assert left[token] > 0.0
        drawn.append(token)
        left = without_token(left, token)
    assert sorted(drawn) == np.flatnonzero(drawn_from).tolist()


@dataclass
class ToyModels:
    """Draft and target as tables over a few tokens and texts up to three tokens long; they differ much."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def __post_init__(self) -> None:
        self.tables: dict[tuple[int, ...], tuple[Probs, Probs]] = {}

    def probs(self, text: tuple[int, ...]) -> tuple[Probs, Probs]:
        """Return the target's and the draft's distribution; there is always a token that only the target has."""
        if text not in self.tables:
            target, draft = self.random.dirichlet(np.full(VOCAB, 0.7), 2)
            draft[len(text) % VOCAB] = 0.0
            self.tables[text] = target, draft / draft.sum()
        return self.tables[text]

    def expand_below(self, text: tuple[int, ...]) -> "ToyExpand":
        return ToyExpand(self, {ROOT: text})


@dataclass
class ToyExpand:
    """The draft's forwards below one text."""

    toy: ToyModels
    texts: dict[int, tuple[int, ...]]

    def __call__(self, nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        for node, parent, token in zip(nodes, parents, tokens, strict=True):
            self.texts[node] = (*self.texts[parent], token)
        return np.stack([self.toy.probs(self.texts[node][-3:])[1] for node in nodes])


def target_probs(toy: ToyModels, text: tuple[int, ...], tree: SampledTree) -> NDArray[np.float64]:
    texts = [text]
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        texts.append((*texts[parent + 1], token))
    return np.stack([toy.probs(below[-3:])[0] for below in texts])


def grow_best(size: int, toy: ToyModels, text: tuple[int, ...]) -> SampledTree:
    """Return a tree of the draft's likeliest tokens, which were not drawn: the rule does not allow that."""
    draft = toy.probs(text)[1]
    best = np.argsort(-draft)[: min(size, np.count_nonzero(draft))]
    return SampledTree(np.full(len(best), ROOT), best, {ROOT: draft})


def first_two(
    toy: ToyModels, shape: Shape | None, size: int, random: np.random.Generator
) -> tuple[tuple[int, int], Shape]:
    """Return a text's first two tokens, from as many rounds as they take.

    Without a shape, trees consist of the likeliest children.
    """
    text: tuple[int, ...] = ()
    while len(text) < 2:
        if shape is None:
            tree = grow_best(size, toy, text)
        else:
            tree = shape.grow(size, toy.probs(text)[1], toy.expand_below(text), random)
        walk, trials = walk_by_rejection(tree, target_probs(toy, text, tree), random)
        text += (*tree.tokens[list(walk.accepted)].tolist(), walk.bonus)
        shape = shape and shape.updated(trials)
    return (text[0], text[1]), shape


def p_value(shape: Shape | None, size: int, texts: int = 6000) -> float:
    """Return the p-value of texts' first two tokens under the target's own distribution of them."""
    toy, random = ToyModels(), np.random.default_rng(20261121)
    counts = np.zeros((VOCAB, VOCAB))
    for _ in range(texts):
        tokens, shape = first_two(toy, shape, size, random)
        counts[tokens] += 1
    first = toy.probs(())[0]
    expected = texts * first[:, None] * np.stack([toy.probs((token,))[0] for token in range(VOCAB)])
    common = expected >= 5.0
    return float(
        chisquare([*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]).pvalue
    )


@by_shape
@pytest.mark.parametrize("size", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_texts_are_distributed_as_the_targets_own(shape: Shape, size: int) -> None:
    """They are so while the shape learns, and uses what it has drawn to decide where it draws next."""
    assert p_value(shape, size) > 0.01


def test_p_value_shows_children_chosen_by_rank() -> None:
    assert p_value(None, 2) < 1e-6


@by_shape
@given(st.integers(1, 30), st.integers(0, 2**32))
def test_tree_has_the_requested_size_and_distinct_siblings(shape: Shape, size: int, seed: int) -> None:
    toy = ToyModels()
    tree = shape.grow(size, toy.probs(())[1], toy.expand_below(()), np.random.default_rng(seed))
    assert (tree.parents < np.arange(len(tree.tokens))).all()
    for node, draft_probs in tree.draft_probs.items():
        siblings = tree.tokens[tree.children(node)]
        assert len(set(siblings.tolist())) == len(siblings)
        assert (draft_probs[siblings] > 0.0).all()
    # A static plan may have more children than the draft has tokens; then the tree is smaller.
    assert len(tree.tokens) == size or (isinstance(shape, StaticShape) and len(tree.tokens) < size)


def test_static_shape_is_wide_where_first_children_fail_else_deep() -> None:
    trusting = StaticShape().updated([Trial(0, 0.5, accepted=True)] * 500)
    doubting = StaticShape().updated([Trial(0, 0.5, accepted=False)] * 50 + [Trial(1, 0.5, accepted=True)] * 50)
    assert trusting.plan_parents(6).tolist() == [-1, 0, 1, 2, 3, 4]
    assert doubting.plan_parents(4).tolist()[:2] == [-1, -1]


def test_best_first_goes_deep_where_the_draft_is_sure() -> None:
    """One draft distribution is sure and one is flat; past trials say that a sure draft is right."""
    sure, flat = normalise([97, 1, 1, 1]), normalise([1, 1, 1, 1])
    updated = BestFirstShape().updated([Trial(0, 0.97, accepted=True)] * 200 + [Trial(0, 0.25, accepted=False)] * 200)

    def expand(nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        return np.stack([sure if token == 0 else flat for token in tokens])

    tree = updated.grow(8, sure, expand, np.random.default_rng(0))
    chain = [node for node, token in enumerate(tree.tokens.tolist()) if token == 0]
    assert len(chain) >= 6
