"""A lattice becomes a tree of its likeliest paths, and trigrams refine it by the tokens before."""

import math

import numpy as np
import pytest
import torch

from treeswarm_bench.speculators.kinds.ngram_model import TrigramModel
from treeswarm_node.speculator.parallel.lattice import CANDIDATES, LatticeTree, make_lattice
from treeswarm_node.speculator.seam import SpeculatedTree

VOCAB = 100
ROOT = np.array([1, 2])


def paths_of(tree: SpeculatedTree) -> dict[tuple[int, ...], float]:
    """Return the score of every path of a tree."""
    paths: list[tuple[int, ...]] = []
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return dict(zip(paths, tree.scores.tolist(), strict=True))


def random_scores(levels: int = 3, sharp: float = 3.0) -> torch.Tensor:
    return torch.randn(levels, VOCAB, generator=torch.Generator().manual_seed(0)) * sharp


def grown(tree: LatticeTree, size: int) -> SpeculatedTree:
    *_, last = tree.grow(size)
    return last


def test_an_unrefined_tree_has_the_likeliest_paths() -> None:
    """They are those of all combinations of the positions' tokens, and their scores are sums."""
    scores = random_scores()
    logprobs = torch.log_softmax(scores, -1).numpy()
    found = paths_of(grown(LatticeTree(make_lattice(scores, torch.arange(VOCAB)), ROOT), 12))
    everything = {
        path: sum(float(logprobs[level, token]) for level, token in enumerate(path))
        for depth in (1, 2, 3)
        for path in np.ndindex(*[VOCAB] * depth)
    }
    best = sorted(everything, key=lambda path: -everything[path])[:12]
    assert set(found) == set(best)
    for path, score in found.items():
        assert score == pytest.approx(everything[path], abs=1e-4)


def test_tokens_outside_the_candidates_keep_their_share() -> None:
    """A flat position is no better for being cut to its candidates."""
    flat = make_lattice(torch.zeros(1, VOCAB), torch.arange(VOCAB))
    tree = grown(LatticeTree(flat, ROOT), 8)
    assert len(flat.tokens[0]) == CANDIDATES < VOCAB
    assert tree.scores.tolist() == pytest.approx([-math.log(VOCAB)] * 8, abs=1e-4)


def test_corrections_follow_the_two_tokens_before() -> None:
    """The token that the correction favours after a pair comes first there, and nowhere else."""
    lattice = make_lattice(torch.zeros(2, 4), torch.tensor([10, 11, 12, 13]))
    asked: list[list[int]] = []

    def correct(levels: np.ndarray, before: np.ndarray) -> np.ndarray:
        asked.extend(before.tolist())
        favoured = np.where(before[:, 1] == 10, 13, 12)
        return np.where(lattice.tokens[levels] == favoured[:, None], 5.0, 0.0).astype(np.float32)

    paths = paths_of(grown(LatticeTree(lattice, np.array([7, 10]), correct), 20))
    assert max((p for p in paths if len(p) == 1), key=lambda p: paths[p]) == (13,)
    assert max((p for p in paths if len(p) == 2 and p[0] == 10), key=lambda p: paths[p]) == (10, 13)
    assert max((p for p in paths if len(p) == 2 and p[0] == 11), key=lambda p: paths[p]) == (11, 12)
    assert asked[0] == [7, 10]
    assert [10, 13] in asked


def test_trigram_chances_are_mixed_by_what_was_seen() -> None:
    """By hand: after (1, 2) came 3 twice and 4 twice, after 2 also 5 once."""
    texts = [np.array(text) for text in ([1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 4], [9, 2, 5])]
    model = TrigramModel.count(texts, 10)
    total = 15 + 10 * 0.5
    single = {3: 2.5 / total, 5: 1.5 / total, 8: 0.5 / total}
    pair = {token: (count + 3 * single[token]) / (5 + 3) for token, count in ((3, 2), (5, 1), (8, 0))}
    triple = {token: (count + 2 * pair[token]) / (4 + 2) for token, count in ((3, 2), (5, 0), (8, 0))}
    found = model.logprobs(np.array([[1, 2], [6, 2], [6, 7]]), np.array([[3, 5, 8]] * 3))
    for row, expected in zip(found, (triple, pair, single), strict=True):
        assert row.tolist() == pytest.approx([math.log(expected[token]) for token in (3, 5, 8)], abs=1e-6)


def test_trigram_chances_sum_to_one_and_survive_their_tensors() -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(0, 20, 50) for _ in range(8)]
    model = TrigramModel.count(texts, 20)
    tensors = model.tensors()
    before = np.stack([texts[0][:10], texts[0][1:11]], 1)
    chances = np.exp(model.logprobs(before, np.tile(np.arange(20), (10, 1))))
    assert chances.sum(1).tolist() == pytest.approx([1.0] * 10, abs=1e-5)
    again = TrigramModel.from_tensors(tensors)
    assert not tensors
    assert np.array_equal(again.logprobs(before, before), model.logprobs(before, before))
