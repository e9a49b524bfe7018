"""Drafts obey the rules of their text: excluded guesses are cut, and a draft model ranks what the rules leave."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.support.toy_grammar import ToyGrammarPaths, toy_allowed
from transformers import LlamaConfig, LlamaForCausalLM

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import Grammar, RulesRequest, TextRules
from treeswarm_client.drafters.model import ModelDrafter
from treeswarm_client.drafters.seam import NO_TREE, DraftTree, ObeysRules, Verification
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_client.drafters.tail.tail_drafter import TailDrafter
from treeswarm_client.drafters.token_recycling import TokenRecyclingDrafter
from treeswarm_client.drafters.union import UnionDrafter
from treeswarm_client.generation.draft_rules import DraftRules

VOCAB = 13
PROMPT = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2]
BANS = TextRules(bad_words=((5,), (3, 4), (1, 2)), min_tokens=3, end_tokens=(6,))


def draft_model() -> ModelDrafter:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    from treeswarm_client.drafters.draft_model import IMPLEMENTATION, register

    register()
    model.set_attn_implementation(IMPLEMENTATION)
    return ModelDrafter(model, VOCAB, 96)


def paths_of(tree: DraftTree) -> list[list[int]]:
    paths: list[list[int]] = []
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


def obeying(drafter: ObeysRules, rules: TextRules, *, with_grammar: bool = False) -> DraftRules:
    grammar = ToyGrammarPaths(VOCAB, len(PROMPT)) if with_grammar else None
    asked = DraftRules(RulesRequest(rules, len(PROMPT)), list(PROMPT), grammar)
    drafter.obey(asked)
    return asked


@pytest.mark.parametrize(
    "make",
    [
        SuffixDrafter,
        TokenRecyclingDrafter,
        draft_model,
        lambda: UnionDrafter([SuffixDrafter(), TokenRecyclingDrafter(), draft_model()]),
    ],
    ids=["suffix", "recycling", "model", "union"],
)
def test_excluded_guesses_are_cut(make: Callable[[], UnionDrafter]) -> None:
    drafter = make()
    drafter.begin(PROMPT, SamplingSettings())
    free = [path[-1] for path in paths_of(drafter.propose(12, 6)) if len(path) == 1]
    for rules in (BANS, TextRules(bad_words=tuple((token,) for token in free)), TextRules(no_repeat_ngram_size=2)):
        asked = obeying(drafter, rules)
        drafter.begin(PROMPT, SamplingSettings())
        for path in paths_of(drafter.propose(12, 6)):
            assert asked.allowed(path[:-1], path[-1:]) == [True]
    drafter.obey(None)
    drafter.begin(PROMPT, SamplingSettings())
    assert [path[-1] for path in paths_of(drafter.propose(12, 6)) if len(path) == 1] == free


@pytest.mark.parametrize("make", [SuffixDrafter, draft_model], ids=["suffix", "model"])
def test_drafts_follow_a_grammar(make: Callable[[], SuffixDrafter]) -> None:
    drafter = make()
    obeying(drafter, TextRules(grammar=Grammar("json_object")), with_grammar=True)
    drafter.begin(PROMPT, SamplingSettings())
    paths = paths_of(drafter.propose(12, 6))
    assert all(path[-1] in toy_allowed(path[:-1], VOCAB) for path in paths)


def test_a_draft_model_ranks_what_penalties_leave() -> None:
    """A bias that no other token can reach is drafted first, until it is observed and the frequency counts it."""
    drafter, rules = draft_model(), TextRules(logit_bias=((9, 60.0),), frequency_penalty=2.0)
    asked = obeying(drafter, rules)
    drafter.begin(PROMPT, SamplingSettings())
    tree = drafter.propose(8, 4)
    assert paths_of(tree)[:3] == [[9], [9, 9], [9, 9, 9]]
    settled = Verification(tree.best(1), np.array([9, 9]), [0], 9)
    asked.text += [9, 9]
    drafter.observe(settled)
    assert drafter.propose(1, 1).tokens.tolist() == [9]


def test_edited_drafts_equal_the_rules_on_the_models_own_logits() -> None:
    """The root's candidates are those of the rules applied to logits that the model gives for the whole text."""
    drafter, rules = draft_model(), TextRules(repetition_penalty=1.8, presence_penalty=0.7, bad_words=((2, 3),))
    obeying(drafter, rules)
    drafter.begin(PROMPT, SamplingSettings())
    best = drafter.propose(1, 1).tokens.tolist()
    other = draft_model()
    other.begin(PROMPT[:-1], SamplingSettings())
    logits = other._draft.feed([*other._unread, PROMPT[-1]])
    edits = DraftRules(RulesRequest(rules, len(PROMPT)), list(PROMPT)).edits(
        np.empty(0, np.int64), np.empty(0, np.int64), np.array([-1])
    )
    expected = logits.clone()
    expected[:, edits.tokens] = torch.from_numpy(edits.edited(logits[:, edits.tokens].numpy()))
    assert best == [int(expected[0].argmax())]


def test_a_tails_proposal_loses_excluded_nodes_and_what_is_below() -> None:
    drafter = TailDrafter()
    obeying(drafter, TextRules(bad_words=((5,), (3, 4))))
    drafter.begin(PROMPT, SamplingSettings())
    parents, tokens = np.array([-1, 0, -1, 2, 1]), np.array([3, 4, 5, 7, 8])
    drafter.receive(DraftTree(parents, tokens, -np.arange(5, dtype=np.float32)))
    assert paths_of(drafter.propose(9, 9)) == [[3]]
    drafter.observe(Verification(NO_TREE, np.array([1]), [], 1))
    drafter.receive(DraftTree(np.array([-1, 0]), np.array([7, 8]), -np.arange(2, dtype=np.float32)))
    assert paths_of(drafter.propose(9, 9)) == [[7], [7, 8]]
