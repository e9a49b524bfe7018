"""The rules of acceptance keep the target's distribution, and the pool of n-grams proposes what it has seen."""

import numpy as np
import pytest
import torch

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_bench.benchmarks.sampling import acceptance
from treeswarm_bench.benchmarks.sampling.acceptance import RULES
from treeswarm_bench.benchmarks.sampling.lookahead_pool import FOLLOWING, LookaheadPoolDrafter
from treeswarm_bench.benchmarks.sampling.online import DEPTH, ROUND, Correction, GrownText, _traversals, follow
from treeswarm_client.drafters.seam import NO_TREE, Verification

TARGET, DRAFT = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.2, 0.3, 0.1, 0.4])


def chance(rule: str, children: int) -> float:
    return RULES[rule](TARGET, DRAFT, children, np.random.default_rng(0))


@pytest.mark.parametrize("rule", list(RULES))
def test_a_draft_equal_to_the_target_is_always_right(rule: str) -> None:
    assert RULES[rule](TARGET, TARGET, 1, np.random.default_rng(0)) == pytest.approx(1.0)


@pytest.mark.parametrize("rule", [rule for rule in RULES if "shared" not in rule])
def test_one_child_has_the_chance_of_speculative_sampling(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rules by rejection are the same for one child: the sum of the smaller probabilities."""
    monkeypatch.setattr(acceptance, "DRAWS", 4000)  # of the one rule whose chance is an average
    assert chance(rule, 1) == pytest.approx(0.2 + 0.3 + 0.1, abs=0.02)


def test_k_sequential_accepts_no_token_more_often_than_the_target() -> None:
    """With two draws, ρ is the least value whose accepted share of each token stays below the target's."""
    any_accepted = chance("k-sequential (SpecTr)", 2)
    rhos = np.linspace(1.0, 2.0, 100_001)
    accepted = np.minimum(TARGET / rhos[:, None], DRAFT).sum(1)
    rho = rhos[np.argmax(rhos * accepted >= 1.0 - (1.0 - accepted) ** 2)]
    share = np.minimum(TARGET / rho, DRAFT)
    assert any_accepted == pytest.approx(1.0 - (1.0 - share.sum()) ** 2, abs=1e-4)
    assert (any_accepted * share / share.sum() <= TARGET + 1e-4).all()


def test_recursive_rejection_multiplies_what_each_try_misses() -> None:
    first = 0.6
    rest = np.array([0.3, 0.0, 0.1, 0.0]) / 0.4
    second = np.minimum(rest, DRAFT).sum()
    assert chance("recursive rejection (SpecInfer)", 2) == pytest.approx(1.0 - (1.0 - first) * (1.0 - second))


def test_draws_without_replacement_end_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "DRAWS", 400)
    assert chance("without replacement (multi-candidate)", 4) == pytest.approx(1.0)
    assert chance("without replacement (multi-candidate)", 2) > chance("recursive rejection (SpecInfer)", 2)


def test_an_online_draft_learns_only_after_it_has_guessed() -> None:
    """With one text of two tokens in turn, guesses of the first round are the unchanged draft's."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 16, bias=False).requires_grad_(False)
    states = torch.randn(1, 8).repeat(4 * ROUND, 1)
    logits = torch.full((4 * ROUND, 16), -5.0)
    logits[:, 3] = 5.0
    text = GrownText(np.full(4 * ROUND, 3), states, logits, torch.zeros(4 * ROUND, 16))
    before = follow(text, head, None)
    after = follow(text, head, Correction(head, None, 0.5))
    assert (after[:ROUND] == before[:ROUND]).all()
    assert before[0] > 0
    assert (after[ROUND:] == 0).all()


def test_a_traversal_follows_hits_and_buys_one_token_more() -> None:
    assert _traversals(np.array([True] * 3 + [False] + [False])) == 2
    assert _traversals(np.array([True] * (DEPTH + 1))) == 1


def test_the_pool_proposes_the_ngrams_after_the_last_token() -> None:
    drafter = LookaheadPoolDrafter()
    drafter.begin([7, 1, 2, 3, 4, 5, 7], SamplingSettings())
    tree = drafter.propose(8, 8)
    assert tree.tokens.tolist() == [1, 2, 3, 4]
    assert tree.parents.tolist() == [-1, 0, 1, 2]
    assert len(tree) == FOLLOWING


def test_the_pool_learns_from_branches_that_were_rejected() -> None:
    drafter = LookaheadPoolDrafter()
    drafter.begin([7, 1, 2, 7], SamplingSettings())
    tree = drafter.propose(2, 2)
    assert tree.tokens.tolist() == [1, 2]
    # The target goes on with 9; after the rejected 7 1 it would have said 6, after 7 1 2 then 8.
    drafter.observe(Verification(tree, np.array([9, 6, 8]), (), 9))
    drafter.observe(Verification(NO_TREE, np.array([7]), (), 7))
    paths = {(int(t.parents[i]), int(t.tokens[i])) for t in [drafter.propose(8, 3)] for i in range(len(t))}
    assert {(-1, 9), (-1, 1)} <= paths
    assert {token for _, token in paths} >= {6, 8}
