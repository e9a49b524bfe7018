"""Drafters without a model agree with plain searching, and learn and forget what they should."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.ngram_index import SEPARATOR, IndexedText
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, Verification
from treeswarm_client.drafters.suffix import LEAD, LONGER, LONGEST, LOOKED_AT, SuffixDrafter, branches
from treeswarm_client.drafters.table_tree import WORTHLESS, HitRates, TableTree
from treeswarm_client.drafters.token_recycling import SUCCESSORS, TokenRecyclingDrafter

GREEDY = SamplingSettings()


def tree_of(*nodes: tuple[int, int]) -> DraftTree:
    """Return a tree of nodes given as (parent, token)."""
    parents, tokens = zip(*nodes, strict=True)
    return DraftTree(np.array(parents), np.array(tokens), -np.arange(len(nodes), dtype=np.float32))


def answer_of(token: int, *best: int) -> Verification:
    """Return the target's answer to an empty tree: its token, and its best tokens."""
    alternatives = np.array([best], np.int64) if best else np.empty((0, 0), np.int64)
    return Verification(NO_TREE, np.array([token]), (), token, alternatives)


def first_level(tree: DraftTree) -> list[int]:
    return tree.tokens[tree.parents == -1].tolist()


# ---------------------------------------------------------------- table trees


class Dice:
    """A table in which every node has the same three children."""

    chances = ((5, -0.2), (6, -2.0), (7, -3.5))

    def context_after(self, context: int, token: int) -> int:
        return context + 1

    def guesses(self, context: int) -> list[tuple[int, float]]:
        return list(self.chances)


@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4), depth=st.integers(0, 5))
def test_a_tree_grown_in_steps_equals_one_grown_at_once(sizes: list[int], depth: int) -> None:
    """It has the best nodes, and none that is worthless."""
    stepwise = TableTree(Dice(), 0, depth)
    for size in sizes:
        tree, whole = stepwise.grow(size), TableTree(Dice(), 0, depth).grow(size)
        assert tree.tokens.tolist() == whole.tokens.tolist()
        assert tree.parents.tolist() == whole.parents.tolist()
        assert (tree.scores >= WORTHLESS).all()
    level = [0.0]
    everything: list[float] = []
    for _ in range(depth):
        level = [above + chance for above in level for _, chance in Dice.chances if above + chance >= WORTHLESS]
        everything += level
    best = sorted(everything, reverse=True)[: sizes[-1]]
    np.testing.assert_allclose(tree.scores, best, atol=1e-5)


# ---------------------------------------------------------------- occurrences and suffixes


@given(tokens=st.lists(st.integers(0, 3), max_size=60), most=st.integers(0, 5))
def test_occurrences_are_returned_latest_first(tokens: list[int], most: int) -> None:
    text = IndexedText()
    text.add(tokens)
    for first in range(4):
        for second in range(4):
            places = [i for i in range(1, len(tokens)) if tokens[i - 1 : i + 1] == [first, second]]
            assert text.ended_by(first, second, most) == places[::-1][:most]


@settings(max_examples=100)
@given(tokens=st.lists(st.integers(0, 2), min_size=2, max_size=16), more=st.lists(st.integers(0, 2), max_size=8))
def test_a_growing_text_is_matched_like_a_complete_one(tokens: list[int], more: list[int]) -> None:
    """As long as all occurrences are looked at: beyond that, a growing text still follows older ones that it found."""
    text = [*tokens, *more]
    assume(max(Counter(pairwise(text)).values()) <= LOOKED_AT)
    grown, whole = SuffixDrafter(), SuffixDrafter()
    grown.begin(tokens, GREEDY)
    whole.begin([*tokens, *more], GREEDY)
    grown.propose(1, 1)
    for token in more:
        grown.observe(Verification(NO_TREE, np.array([UNANSWERED]), (), token))
    tree, expected = grown.propose(30, 6), whole.propose(30, 6)
    assert tree.scores.tolist() == pytest.approx(expected.scores.tolist(), abs=1e-4)
    assert sorted(tree.tokens[:1].tolist()) == sorted(expected.tokens[:1].tolist()) or tree.scores[0] == tree.scores[1]


def test_an_index_forgets_the_oldest_tokens() -> None:
    text = IndexedText(capacity=10)
    text.add([90, 91, 92])
    text.add(list(range(50)))
    assert 10 <= len(text) <= 20
    assert not text.ended_by(90, 91, 9)
    assert [text.tokens[place] for place in text.ended_by(48, 49, 9)] == [49]


@settings(max_examples=200)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=16))
def test_matches_equal_those_of_plain_searching(tokens: list[int]) -> None:
    """The text is so short that all occurrences are looked at, and every match votes with its whole length."""
    drafter = SuffixDrafter()
    drafter.begin(tokens, GREEDY)
    votes: dict[int, float] = {}
    for place in range(len(tokens) - 1):
        length = 0
        while length <= place and tokens[place - length] == tokens[-1 - length]:
            length += 1
        if length >= 2:
            following = tokens[place + 1]
            votes[following] = votes.get(following, 0.0) + LONGER ** min(length, LONGEST)
    tree = drafter.propose(8, 1)
    assert set(tree.tokens.tolist()) == {t for t, vote in votes.items() if vote > 3e-4 * sum(votes.values())}
    chances = dict(zip(tree.tokens.tolist(), np.exp(tree.scores).tolist(), strict=True))
    for token, chance in chances.items():
        assert chance / sum(chances.values()) == pytest.approx(votes[token] / sum(votes.values()), abs=1e-3)


def test_a_repeated_passage_is_followed_to_its_end() -> None:
    passage = list(range(10, 40))
    drafter = SuffixDrafter()
    drafter.begin([*passage, 99, *passage[:5]], GREEDY)
    tree = drafter.propose(20, 20)
    assert tree.tokens.tolist() == passage[5:25]
    assert tree.parents.tolist() == list(range(-1, 19))


def test_a_longer_match_outvotes_many_shorter_ones() -> None:
    drafter = SuffixDrafter()
    drafter.begin([1, 2, 3, 4, 5, 50, *([9, 4, 5, 60] * 8), 1, 2, 3, 4, 5], GREEDY)
    assert drafter.propose(1, 1).tokens.tolist() == [50]


def test_past_outputs_are_kept_and_past_prompts_are_not() -> None:
    drafter = SuffixDrafter()
    drafter.begin([1, 2, 3, 4], GREEDY)
    for token in (20, 21, 22, 23):
        drafter.observe(answer_of(token))
    drafter.begin([30, 20, 21], GREEDY)
    assert drafter.propose(2, 2).tokens.tolist() == [22, 23]
    drafter.begin([30, 2, 3], GREEDY)
    assert len(drafter.propose(2, 2)) == 0


def test_tokens_along_branches_not_walked_are_kept() -> None:
    """The walk goes from 5 to 6; below the wrong 7 the target would have chosen 8, then 9."""
    tree = tree_of((-1, 6), (-1, 7), (1, 8), (1, 3))
    verification = Verification(tree, np.array([6, 40, 8, 9, UNANSWERED]), (0,), 40)
    assert list(branches([4, 5], verification)) == [[4, 5, 7, 8, 9]]
    drafter = SuffixDrafter()
    drafter.begin([4, 5], GREEDY)
    drafter.observe(verification)
    for token in (50, 5, 7):
        drafter.observe(answer_of(token))
    assert drafter.propose(2, 2).tokens.tolist() == [8, 9]


@given(seed=st.integers(0, 1000), size=st.integers(1, 12))
def test_branches_are_all_answers_off_the_walk(seed: int, size: int) -> None:
    """Each branch is a path of the tree and the target's own token at its end.

    Together the branches are all answers that the walk did not use.
    """
    random = np.random.default_rng(seed)
    nodes: list[tuple[int, int]] = []
    for _ in range(size):
        node = (int(random.integers(-1, len(nodes))), int(random.integers(4)))
        nodes += [node] if node not in nodes else []
    tree, answers = tree_of(*nodes), random.integers(-1, 4, len(nodes) + 1)
    answered: list[list[int]] = []
    for i, (parent, token) in enumerate(nodes):
        path, above = [token], parent
        while above >= 0:
            path.insert(0, nodes[above][1])
            above = nodes[above][0]
        if answers[i + 1] != UNANSWERED:
            answered.append([*path, int(answers[i + 1])])
    yielded = list(branches([8, 9], Verification(tree, answers, (), 0)))
    for branch in yielded:
        assert any(branch[-len(path) :] == path or path[-len(branch) :] == branch for path in answered)
        assert len(branch) >= min(LEAD, 3) + 1
        assert SEPARATOR not in branch
    off = [nodes[i] for i in range(len(nodes)) if answers[nodes[i][0] + 1] != nodes[i][1] and answers[i + 1] >= 0]
    assert len(yielded) == len(off)


def test_guesses_that_come_true_get_higher_chances() -> None:
    right, wrong = SuffixDrafter(), SuffixDrafter()
    for drafter, answer in ((right, 3), (wrong, 7)):
        drafter.begin([1, 2, 3, 1, 2], GREEDY)
        for _ in range(40):
            drafter.propose(1, 1)
            drafter.observe(Verification(tree_of((-1, 3)), np.array([answer, UNANSWERED]), (), answer))
            drafter.begin([1, 2, 3, 1, 2], GREEDY)
    assert right.propose(1, 1).scores[0] > -0.2
    assert wrong.propose(1, 1).scores[0] < -1.5


# ---------------------------------------------------------------- token recycling


def test_alternatives_of_the_target_are_the_next_guesses() -> None:
    drafter = TokenRecyclingDrafter()
    drafter.begin([5, 6], GREEDY)
    drafter.observe(answer_of(7, 8, 7, 9))
    drafter.observe(answer_of(6, 1, 2, 3))
    assert first_level(drafter.propose(3, 1)) == [7, 8, 9]
    assert len(drafter.propose(99, 9)) > 3


def test_rejected_nodes_are_learned_and_unanswered_are_not() -> None:
    drafter = TokenRecyclingDrafter()
    drafter.begin([5], GREEDY)
    tree = tree_of((-1, 20), (-1, 21), (-1, 22))
    best = np.array([[20, 21], [30, 31], [32, 33], [UNANSWERED, UNANSWERED]])
    drafter.observe(Verification(tree, np.array([20, 30, 32, UNANSWERED]), (0,), 30, best))
    drafter.observe(answer_of(21, 40, 41))
    assert first_level(drafter.propose(9, 1)) == [32, 33]
    drafter.observe(answer_of(22, 42, 43))
    assert first_level(drafter.propose(9, 1)) == []


def test_without_alternatives_the_latest_answers_come_first() -> None:
    drafter = TokenRecyclingDrafter()
    drafter.begin([5], GREEDY)
    for token in (6, 5, 7, 5, 6, 5):
        drafter.observe(answer_of(token))
    assert first_level(drafter.propose(9, 1)) == [6, 7]


def test_successors_of_the_target_outlive_those_of_a_prompt() -> None:
    drafter = TokenRecyclingDrafter()
    drafter.begin([5, 6, 5, 7, 5], GREEDY)
    assert first_level(drafter.propose(9, 1)) == [7, 6]
    drafter.observe(answer_of(9, 9, 10))
    drafter.begin([1, 5], GREEDY)
    assert first_level(drafter.propose(9, 1)) == [9, 10]


def test_each_rank_learns_its_hit_rate() -> None:
    drafter = TokenRecyclingDrafter()
    drafter.begin([5], GREEDY)
    for _ in range(200):
        drafter.observe(answer_of(5, *range(5, 5 + SUCCESSORS)))
    tree = drafter.propose(2, 1)
    assert tree.tokens.tolist()[0] == 5
    assert tree.scores[0] > np.log(0.9)
    assert len(tree) == 1 or tree.scores[1] < np.log(0.1)


# ---------------------------------------------------------------- hit rates


def test_hit_rates_follow_recent_guesses() -> None:
    rates = HitRates(np.array([0.5, 0.5]))
    assert np.exp(rates.log_rates) == pytest.approx([0.5, 0.5])
    random = np.random.default_rng(0)
    rates.record([(0, bool(random.random() < 0.2)) for _ in range(3000)])
    assert np.exp(rates.log_rates) == pytest.approx([0.2, 0.5], abs=0.05)
    rates.record([(0, True)] * 3000)
    assert np.exp(rates.log_rates[0]) > 0.95
    assert rates.log_rates[0] < 0
