"""A union proposes the best of all its members' nodes and keeps a record of each member."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.seam import NO_NODE, NO_TREE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.drafters.union import MemberRecord, UnionDrafter, best_of_all, found_alone, walk_outcomes


def random_tree(random: np.random.Generator, size: int) -> DraftTree:
    """Return a random tree over three tokens, so that trees share paths."""
    nodes: list[tuple[int, int]] = []
    scores: list[float] = []
    for _ in range(size):
        parent = int(random.integers(-1, len(nodes)))
        node = (parent, int(random.integers(3)))
        if node not in nodes:
            nodes.append(node)
            scores.append((scores[parent] if parent >= 0 else 0.0) - float(random.exponential(0.7)))
    order = sorted(range(len(nodes)), key=lambda i: -scores[i])
    place = {-1: -1} | {old: new for new, old in enumerate(order)}
    return DraftTree(
        np.array([place[nodes[i][0]] for i in order], np.int64),
        np.array([nodes[i][1] for i in order], np.int64),
        np.array([scores[i] for i in order], np.float32),
    )


def by_path(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Return the score of each node by its path."""
    paths: list[tuple[int, ...]] = []
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return dict(zip(paths, tree.scores.tolist(), strict=True))


@dataclass
class Fixed:
    """A drafter that always proposes the same tree."""

    tree: DraftTree
    name: str = "fixed"
    alternatives: int = 0
    seen: list[Verification] = field(default_factory=list)

    def copy_for_new_generation(self) -> "Fixed":
        return Fixed(self.tree)

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self.seen = []

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        return DraftTree(self.tree.parents[:size], self.tree.tokens[:size], self.tree.scores[:size])

    def observe(self, verification: Verification) -> None:
        self.seen.append(verification)


@dataclass
class Slow(Fixed):
    """A drafter that has only the first level when it is told to stop."""

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        first = self.tree.parents < 0
        if should_stop(1.0):
            return DraftTree(self.tree.parents[first], self.tree.tokens[first], self.tree.scores[first])
        return super().propose(size, depth)


def test_nodes_of_a_stopped_draft_do_not_displace_deeper_ones() -> None:
    deep = DraftTree(np.array([-1, 0, 1, -1, -1]), np.arange(5), np.array([-0.1, -0.2, -0.3, -4.0, -5.0], np.float32))
    union = UnionDrafter([Slow(deep)])
    union.begin([1, 2], SamplingSettings())
    hasty = union.propose(3, 9, lambda _: True)
    assert by_path(hasty).keys() == {(0,), (3,), (4,)}
    assert by_path(union.propose(3, 9)).keys() == {(0,), (0, 1), (0, 1, 2)}


@given(seed=st.integers(0, 10_000), count=st.integers(0, 3), size=st.integers(0, 25))
def test_the_union_has_the_best_nodes_by_largest_chance(seed: int, count: int, size: int) -> None:
    random = np.random.default_rng(seed)
    trees = [random_tree(random, int(random.integers(0, 20))) for _ in range(count)]
    chances = [np.exp(tree.scores.astype(np.float64)) for tree in trees]
    union = by_path(best_of_all(NO_TREE, trees, chances, size))
    every: dict[tuple[int, ...], float] = {}
    for tree in trees:
        for path, score in by_path(tree).items():
            every[path] = max(score, every.get(path, -99.0))
    assert list(union.values()) == pytest.approx(sorted(every.values(), reverse=True)[:size], abs=1e-5)
    assert all(every[path] == pytest.approx(score, abs=1e-5) for path, score in union.items())
    assert all(path[:-1] in union or len(path) == 1 for path in union)


@given(seed=st.integers(0, 10_000), first=st.integers(0, 12), size=st.integers(0, 30))
def test_proposed_nodes_stay_and_better_new_ones_precede_them(seed: int, first: int, size: int) -> None:
    """Nodes of a member that had no time before may be better than those proposed."""
    random = np.random.default_rng(seed)
    trees = [random_tree(random, 15) for _ in range(3)]
    chances = [np.exp(tree.scores.astype(np.float64)) for tree in trees]
    before = best_of_all(NO_TREE, trees[:1], chances[:1], first)
    after = best_of_all(before, trees, chances, len(before) + size)
    scores_before, scores_after = by_path(before), by_path(after)
    assert set(scores_before) <= set(scores_after)
    every = by_path(best_of_all(NO_TREE, trees, chances, 100))
    assert all(scores_after[path] == pytest.approx(every[path], abs=1e-5) for path in scores_after)
    assert (np.diff(after.scores) <= 0).all()
    assert all(parent < i for i, parent in enumerate(after.parents.tolist()))
    assert len(by_path(after)) == len(after)


@given(seed=st.integers(0, 10_000))
def test_match_finds_nodes_with_the_same_path(seed: int) -> None:
    random = np.random.default_rng(seed)
    tree, other = random_tree(random, 15), random_tree(random, 15)
    places, here = other.match(tree.index), list(by_path(tree))
    for path, place in zip(by_path(other), places.tolist(), strict=True):
        assert (here[place] == path) if place != NO_NODE else path not in here


def test_outcomes_are_unknown_below_an_unanswered_node() -> None:
    """The walk accepts 1 and 2; node 2 has no answer, so nodes below it may yet be right."""
    tree = DraftTree(np.array([-1, -1, 0, 1, 2]), np.array([1, 5, 2, 6, 3]), np.zeros(5, np.float32))
    judged, on_path = walk_outcomes(Verification(tree, np.array([1, 2, 9, UNANSWERED, 9, 9]), (0,), 2))
    assert on_path.tolist() == [True, False, True, False, False]
    assert judged.tolist() == [True, True, True, True, False]


def test_a_member_that_is_wrong_loses_its_share() -> None:
    def line(*tokens: int, score: float) -> DraftTree:
        count = len(tokens)
        return DraftTree(np.arange(-1, count - 1), np.array(tokens), np.full(count, score, np.float32))

    wrong, right = Fixed(line(1, 2, score=-0.1)), Fixed(line(5, 6, score=-1.0))
    union = UnionDrafter([wrong, right])
    union.begin([0], SamplingSettings())
    assert union.propose(4, 9).tokens.tolist() == [1, 2, 5, 6]
    for _ in range(40):
        tree = union.propose(4, 9)
        node = {int(token): i for i, token in enumerate(tree.tokens)}
        answers = np.full(5, 8)
        answers[0], answers[node[5] + 1] = 5, 6
        union.observe(Verification(tree, answers, (node[5], node[6]), 8))
    assert union.propose(2, 9).tokens.tolist() == [5, 6]
    assert len(wrong.seen) == len(right.seen) == 40
    union.begin([0], SamplingSettings())
    assert union.propose(2, 9).tokens.tolist() == [5, 6], "what was learned outlives a generation"


def test_a_member_counts_by_what_it_alone_found() -> None:
    """A table that is right where the model is right too does not displace the model's own nodes."""
    model = Fixed(DraftTree(np.array([-1, 0]), np.array([1, 2]), np.array([-0.1, -1.2], np.float32)))
    table = Fixed(DraftTree(np.array([-1, -1]), np.array([1, 9]), np.array([-0.1, -0.2], np.float32)))
    union = UnionDrafter([table, model])
    union.begin([0], SamplingSettings())
    for _ in range(20):
        tree = union.propose(3, 9)
        answers = np.full(4, 8)
        answers[[0, tree.index[-1, 1] + 1]] = 1, 2
        union.observe(Verification(tree, answers, (tree.index[-1, 1], tree.index[tree.index[-1, 1], 2]), 8))
    assert by_path(union.propose(2, 9)).keys() == {(1,), (1, 2)}


@given(seed=st.integers(0, 10_000), count=st.integers(1, 3))
def test_nodes_found_alone_are_in_no_other_tree(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    trees = [random_tree(random, int(random.integers(0, 20))) for _ in range(count)]
    for i, (tree, alone) in enumerate(zip(trees, found_alone(trees), strict=True)):
        others = {path for j, other in enumerate(trees) if j != i for path in by_path(other)}
        assert [path not in others for path in by_path(tree)] == alone.tolist()


@given(seed=st.integers(0, 10_000))
def test_chances_never_rise_along_a_path(seed: int) -> None:
    """Whatever the records say, a node found by one member alone has no better chance than its parent."""
    random = np.random.default_rng(seed)
    tree, other = random_tree(random, 20), random_tree(random, 20)
    record = MemberRecord()
    for _ in range(5):
        on_path = random.random(len(tree)) < random.random()
        record = record.with_round(tree.scores, random.random(len(tree)) < 0.5, on_path)
    chances = np.append(record.chances(tree.scores, found_alone([tree, other])[0]), 1.0)
    assert (chances[:-1] <= chances[tree.parents] + 1e-12).all()


def test_alternatives_are_the_largest_of_all_members() -> None:
    members = [Fixed(NO_TREE), Fixed(NO_TREE, alternatives=8), Fixed(NO_TREE, alternatives=3)]
    assert UnionDrafter(members).alternatives == 8
    assert UnionDrafter([]).alternatives == 0
