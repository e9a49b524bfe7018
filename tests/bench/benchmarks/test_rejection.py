"""Trees sampled from a draft and verified by rejection: is the text the target's, and are the trees what they claim?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from treeswarm_bench.benchmarks.rejection import (
    ROOT,
    Probs,
    SampledTree,
    Trial,
    child_odds,
    draw_token,
    walk_by_rejection,
    without_token,
)
from treeswarm_bench.benchmarks.sampled_trees import BestFirstShape, Shape, StaticShape

VOCAB = 4
weights = st.lists(st.integers(0, 20), min_size=VOCAB, max_size=VOCAB).filter(any)
SHAPES = [StaticShape(), BestFirstShape()]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=["static", "best-first"])


def normalised(of: Sequence[float]) -> Probs:
    return np.array(of, np.float64) / sum(of)


@given(weights, weights, st.integers(0, VOCAB))
def test_one_nodes_token_is_the_targets_by_counting_every_way_its_children_can_be_drawn(
    target: list[int], draft: list[int], children: int
) -> None:
    target_probs, draft_probs = normalised(target), normalised(draft)
    came = np.zeros(VOCAB)
    offered = np.flatnonzero(draft_probs).tolist()
    for drawn in permutations(offered, min(children, len(offered))):
        found = child_odds(target_probs, draft_probs, drawn)
        here = float(np.prod(found.draft_probs))
        for token, chance in zip(drawn, found.accepted, strict=True):
            came[token] += here * chance
            here *= 1.0 - chance
        came += here * found.rest
    np.testing.assert_allclose(came, target_probs, atol=1e-12)


@given(weights, st.integers(0, 2**32))
def test_what_is_drawn_has_a_probability_and_is_not_drawn_again(of: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    left: Probs | None = normalised(of)
    drawn = []
    while left is not None:
        token = draw_token(left, random)
        assert left[token] > 0.0
        drawn.append(token)
        left = without_token(left, token)
    assert sorted(drawn) == np.flatnonzero(of).tolist()


@dataclass
class Toy:
    """Draft and target over a few tokens, of texts up to three tokens long: tables, and not much alike."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def __post_init__(self) -> None:
        self.tables: dict[tuple[int, ...], tuple[Probs, Probs]] = {}

    def probs(self, text: tuple[int, ...]) -> tuple[Probs, Probs]:
        """Target's and draft's; there is always a token that the target may say and the draft never offers."""
        if text not in self.tables:
            target, draft = self.random.dirichlet(np.full(VOCAB, 0.7), 2)
            draft[len(text) % VOCAB] = 0.0
            self.tables[text] = target, draft / draft.sum()
        return self.tables[text]

    def expand_below(self, text: tuple[int, ...]) -> "_Expansion":
        return _Expansion(self, {ROOT: text})


@dataclass
class _Expansion:
    toy: Toy
    texts: dict[int, tuple[int, ...]]

    def __call__(self, nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        for node, parent, token in zip(nodes, parents, tokens, strict=True):
            self.texts[node] = (*self.texts[parent], token)
        return np.stack([self.toy.probs(self.texts[node][-3:])[1] for node in nodes])


def target_probs(toy: Toy, text: tuple[int, ...], tree: SampledTree) -> NDArray[np.float64]:
    texts = [text]
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        texts.append((*texts[parent + 1], token))
    return np.stack([toy.probs(below[-3:])[0] for below in texts])


def grow_best(size: int, toy: Toy, text: tuple[int, ...]) -> SampledTree:
    """The draft's likeliest tokens below the root: drawn from nothing, which the rule does not allow."""
    draft = toy.probs(text)[1]
    best = np.argsort(-draft)[: min(size, np.count_nonzero(draft))]
    return SampledTree(np.full(len(best), ROOT), best, {ROOT: draft})


def first_two(toy: Toy, shape: Shape | None, size: int, random: np.random.Generator) -> tuple[tuple[int, int], Shape]:
    """A text's first two tokens, in as many rounds as they take; without a shape, the likeliest children."""
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


def doubt(shape: Shape | None, size: int, texts: int = 6000) -> float:
    """The p-value of texts' first two tokens under the target's own distribution of them."""
    toy, random = Toy(), np.random.default_rng(20261121)
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
    """Also while the shape learns, and decides by what it has drawn where it draws next."""
    assert doubt(shape, size) > 0.01


def test_the_test_would_notice_children_chosen_by_rank() -> None:
    assert doubt(None, 2) < 1e-6


@by_shape
@given(st.integers(1, 30), st.integers(0, 2**32))
def test_a_tree_is_as_large_as_asked_for_and_its_siblings_differ(shape: Shape, size: int, seed: int) -> None:
    toy = Toy()
    tree = shape.grow(size, toy.probs(())[1], toy.expand_below(()), np.random.default_rng(seed))
    assert (tree.parents < np.arange(len(tree.tokens))).all()
    for node, draft_probs in tree.draft_probs.items():
        siblings = tree.tokens[tree.children(node)]
        assert len(set(siblings.tolist())) == len(siblings)
        assert (draft_probs[siblings] > 0.0).all()
    # A static plan may want more children than the draft has tokens, and then goes without those.
    assert len(tree.tokens) == size or (isinstance(shape, StaticShape) and len(tree.tokens) < size)


def test_a_static_shape_grows_wide_where_first_children_fail_and_deep_where_they_do_not() -> None:
    trusting = StaticShape().updated([Trial(0, 0.5, accepted=True)] * 500)
    doubting = StaticShape().updated([Trial(0, 0.5, accepted=False)] * 50 + [Trial(1, 0.5, accepted=True)] * 50)
    assert trusting.plan_parents(6).tolist() == [-1, 0, 1, 2, 3, 4]
    assert doubting.plan_parents(4).tolist()[:2] == [-1, -1]


def test_best_first_draws_on_where_the_draft_is_sure() -> None:
    """One draft distribution is sure and one is flat; figures say that a sure draft is right."""
    sure, flat = normalised([97, 1, 1, 1]), normalised([1, 1, 1, 1])
    updated = BestFirstShape().updated([Trial(0, 0.97, accepted=True)] * 200 + [Trial(0, 0.25, accepted=False)] * 200)

    def expand(nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        return np.stack([sure if token == 0 else flat for token in tokens])

    tree = updated.grow(8, sure, expand, np.random.default_rng(0))
    chain = [node for node, token in enumerate(tree.tokens.tolist()) if token == 0]
    assert len(chain) >= 6
