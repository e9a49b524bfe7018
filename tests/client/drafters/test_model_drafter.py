"""Trees of a draft model agree with plain forwards of the same model, and nothing is computed twice."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.drafters.conftest import (
    VOCAB,
    drafter_of,
    half_agreeing,
    noised,
    paths_of,
    plain_logprobs,
    tiny_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import walk
from treeswarm_client.drafters import draft_model, load_drafter
from treeswarm_client.drafters.draft_model import DraftMemory
from treeswarm_client.drafters.model import RAW_DECAY, DraftOptions, ModelDrafter
from treeswarm_client.drafters.model_tree import ModelTreeOptions
from treeswarm_client.drafters.seam import NO_TREE, DraftTree, Verification

GREEDY = SamplingSettings()
SAMPLED = SamplingSettings(temperature=0.8, seed=11, sample=2)
# Scores of this ranking never change, so nodes that were drafted ahead are never dropped.
RAW = DraftOptions(ranking="raw")
PROMPT = [5, 3, 40, 7, 7, 19, 22]


def pair(
    family: str = "llama", options: DraftOptions | None = None, **changes: Any
) -> tuple[PreTrainedModel, ModelDrafter]:
    """Return a model that no drafter uses, and a drafter with the same weights."""
    model = tiny_model(family, **changes)
    return model, drafter_of(copy.deepcopy(model), options)


def play(drafter: ModelDrafter, text: list[int], rounds: int, size: int, seed: int = 0) -> None:
    """Play rounds with a target that sometimes agrees; `text` grows as the drafter's context does."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        tree = drafter.propose(size, 20)
        answers = half_agreeing(tree, rng)
        walked = walk(tree.parents, tree.tokens, answers)
        drafter.observe(Verification(tree, answers, walked.accepted, walked.bonus))
        text += [*(int(tree.tokens[i]) for i in walked.accepted), walked.bonus]


def expected_scores(
    model: PreTrainedModel, text: list[int], tree: DraftTree, settings: SamplingSettings, tau: float
) -> list[float]:
    """Return the cumulative log_softmax((log p + gumbel) / τ) along each node's path, without any cache."""
    scores = []
    for path in paths_of(tree):
        total = 0.0
        for i, token in enumerate(path):
            context = [*text, *path[:i]]
            ranked = torch.from_numpy(noised(plain_logprobs(model, context, settings), len(context), settings) / tau)
            total += float(torch.log_softmax(ranked, -1)[token])
        scores.append(total)
    return scores


def test_slow_forwards_do_not_end_drafting_for_ever() -> None:
    """A drafter that overestimates forwards makes none, and must still learn that they have become fast."""
    _, drafter = pair()
    now, step_s = 0.0, 5.0

    def clock() -> float:
        nonlocal now
        now += step_s
        return now

    drafter.clock = clock
    drafter.begin(PROMPT, GREEDY)
    for _ in range(9):
        drafter.propose(60, 6)
        drafter.observe(Verification(NO_TREE, np.array([3]), (), 3))
    step_s = 0.001
    levels = []
    for _ in range(90):
        tree = drafter.propose(60, 6, lambda tokens_per_second: tokens_per_second < 10.0)
        levels.append(max(map(len, paths_of(tree))))
        unexpected = next(token for token in range(1000) if token not in tree.tokens)
        drafter.observe(Verification(NO_TREE, np.array([unexpected]), (), unexpected))
    assert levels[0] == 1 < levels[-1]


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt_neox"])
def test_scores_follow_the_formula_after_many_rounds(family: str, settings: SamplingSettings) -> None:
    model, drafter = pair(family, DraftOptions(tree=ModelTreeOptions(width=3)))
    text = list(PROMPT)
    drafter.begin(text, settings)
    play(drafter, text, rounds=5, size=30)
    tree = drafter.propose(20, 6)
    assert max(map(len, paths_of(tree))) > 2
    np.testing.assert_allclose(
        tree.scores, expected_scores(model, text, tree, settings, drafter.ranking_tau), atol=2e-4
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 2.0}),
        ("gpt_oss", {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
        ("llama4_text", {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}),
    ],
)
def test_rows_see_no_farther_than_the_draft_models_own_attention(family: str, changes: dict[str, Any]) -> None:
    """Windows, chunks, soft caps and sinks count in the trunk, in the tree and across both."""
    model, drafter = pair(family, DraftOptions(tree=ModelTreeOptions(width=3)), **changes)
    text = [*PROMPT, *PROMPT]
    drafter.begin(text, GREEDY)
    play(drafter, text, rounds=4, size=16)
    tree = drafter.propose(24, 12)
    assert max(map(len, paths_of(tree))) > 2
    expected = expected_scores(model, text, tree, GREEDY, drafter.ranking_tau)
    np.testing.assert_allclose(tree.scores, expected, atol=5e-4)


def test_a_draft_whose_attention_is_not_computed_here_is_refused() -> None:
    model = tiny_model("mistral", sliding_window=8)
    drafter = drafter_of(copy.deepcopy(model))
    drafter._draft.check_trees("windowed")
    drafter.model.model.layers[0].self_attn.scaling *= 1.5  # as an argument that our attention does not take would do
    unscaled = draft_model._attend

    def forgets_scaling(*args: Any, **options: Any) -> Any:
        return unscaled(*args, **options | {"scaling": None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_model, "_attend", forgets_scaling)
        draft_model.register()
        with pytest.raises(UnsupportedModel, match="differ from transformers' own attention by"):
            drafter._draft.check_trees("rescaled")
    draft_model.register()


def test_raw_ranking_is_the_probability_discounted_by_depth() -> None:
    model, drafter = pair(options=DraftOptions(ranking="raw"))
    drafter.begin(PROMPT, SAMPLED)
    tree = drafter.propose(20, 6)
    for path, score in zip(paths_of(tree), tree.scores, strict=True):
        contexts = [[*PROMPT, *path[:i]] for i in range(len(path))]
        own = sum(plain_logprobs(model, c, SAMPLED)[t] + RAW_DECAY for c, t in zip(contexts, path, strict=True))
        assert score == pytest.approx(own, abs=2e-4)


def test_nodes_drafted_ahead_are_not_computed_again() -> None:
    """A larger tree costs only its new nodes, and below a new root no known node is computed again."""
    _, drafter = pair(options=RAW)
    drafter.begin(PROMPT, GREEDY)
    watch = Watch(drafter)
    small = drafter.propose(20, 9)
    first = sum(watch.forwards)
    large = drafter.propose(200, 9)
    assert set(paths_of(small)) < set(paths_of(large))
    fresh = pair(options=RAW)[1]
    fresh.begin(PROMPT, GREEDY)
    whole = Watch(fresh)
    assert paths_of(fresh.propose(200, 9)) == paths_of(large)
    # The small tree may have needed a node that the large one, in other batches, would not.
    assert sum(watch.forwards) <= sum(whole.forwards) + first
    second = int(large.tokens[np.flatnonzero(large.parents == -1)[1]])
    drafter.observe(Verification(NO_TREE, np.array([second]), (), second))
    watch.forwards.clear()
    assert len(drafter.propose(5, 9)) == 5
    assert watch.forwards == []


@pytest.mark.parametrize(("shared_noise", "all_right"), [(True, True), (False, False)])
def test_a_draft_equal_to_the_target_needs_the_noise(shared_noise: bool, all_right: bool) -> None:
    """Without the shared noise the best chain is the most likely text, not the one that the target chooses."""
    model, drafter = pair(options=DraftOptions(chain=True, shared_noise=shared_noise))
    settings = SamplingSettings(temperature=1.5, seed=4)
    drafter.begin(PROMPT, settings)
    tree = drafter.propose(10, 10)
    truth = list(PROMPT)
    for _ in tree.tokens:
        truth.append(int(noised(plain_logprobs(model, truth, settings), len(truth), settings).argmax()))
    assert len(tree) == 10
    assert (tree.tokens.tolist() == truth[len(PROMPT) :]) == all_right


class Watch:
    """Records the number of rows of each forward."""

    def __init__(self, drafter: ModelDrafter) -> None:
        self.forwards: list[int] = []
        drafter.model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.forwards.append(kwargs["input_ids"].shape[1])


def test_a_small_draft_computes_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the number of threads as it was: the process may use torch for something else."""
    torch.set_num_threads(2)
    seen: list[int] = []
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    drafter = drafter_of(model)
    drafter.begin([1, 2, 3], GREEDY)
    drafter.propose(8, 4)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(draft_model, "ONE_THREAD_PARAMETERS", 0)
    seen.clear()
    drafter = drafter_of(model)
    drafter.begin([1, 2, 3], GREEDY)
    drafter.propose(8, 4)
    assert set(seen) == {2}


def test_an_accepted_token_is_not_computed_again() -> None:
    _, drafter = pair()
    watch = Watch(drafter)
    drafter.begin(PROMPT, GREEDY)
    assert watch.forwards == [len(PROMPT) - 1]
    tree = drafter.propose(40, 12)
    parents_with_children = set(tree.parents.tolist())
    leaf = next(i for i in range(len(tree)) if i not in parents_with_children and tree.parents[i] >= 0)
    path = [leaf]
    while tree.parents[path[0]] >= 0:
        path.insert(0, int(tree.parents[path[0]]))
    drafter.observe(Verification(tree, np.zeros(len(tree) + 1, np.int64), path[:-1], 9))
    watch.forwards.clear()
    drafter.propose(1, 1)
    assert watch.forwards == [1], "only the bonus token is new: the accepted path has its rows"


def test_a_tree_of_one_node_takes_one_forward() -> None:
    _, drafter = pair()
    drafter.begin(PROMPT, GREEDY)
    watch = Watch(drafter)
    assert len(drafter.propose(1, 20)) == 1
    assert watch.forwards == [1]


def test_a_level_takes_one_forward() -> None:
    _, drafter = pair()
    drafter.begin(PROMPT, GREEDY)
    watch = Watch(drafter)
    tree = drafter.propose(64, 8)
    assert max(map(len, paths_of(tree))) <= 8
    assert len(watch.forwards) <= 8


def test_a_prompt_that_continues_the_last_text_is_reused() -> None:
    _, drafter = pair()
    text = list(PROMPT)
    drafter.begin(text, GREEDY)
    play(drafter, text, rounds=4, size=20)
    cached = len(text) - 1
    drafter.propose(1, 1)
    watch = Watch(drafter)
    drafter.begin([*text, 1, 2, 3, 4], SAMPLED)
    assert sum(watch.forwards) == len(text) + 3 - (cached + 1)


def test_proposing_twice_gives_the_same_tree_twice() -> None:
    _, drafter = pair()
    drafter.begin(PROMPT, SAMPLED)
    first, second = drafter.propose(30, 9), drafter.propose(30, 9)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.parents.tolist() == second.parents.tolist()


def test_a_proposal_that_was_not_shipped_changes_nothing() -> None:
    model, drafter = pair()
    drafter.begin(PROMPT, GREEDY)
    drafter.propose(30, 9)
    drafter.observe(Verification(NO_TREE, np.array([17]), (), 17))
    tree = drafter.propose(12, 5)
    expected = expected_scores(model, [*PROMPT, 17], tree, GREEDY, drafter.ranking_tau)
    np.testing.assert_allclose(tree.scores, expected, atol=2e-4)


def test_any_prefix_of_a_proposal_may_be_shipped() -> None:
    """The planner may cut a tree; the nodes that are cut get no answers."""
    model, drafter = pair()
    drafter.begin(PROMPT, GREEDY)
    tree = drafter.propose(40, 9)
    cut = DraftTree(tree.parents[:5], tree.tokens[:5], tree.scores[:5])
    answers = half_agreeing(cut, np.random.default_rng(2))
    walked = walk(cut.parents, cut.tokens, answers)
    drafter.observe(Verification(cut, answers, walked.accepted, walked.bonus))
    text = [*PROMPT, *(int(cut.tokens[i]) for i in walked.accepted), walked.bonus]
    again = drafter.propose(12, 5)
    np.testing.assert_allclose(
        again.scores, expected_scores(model, text, again, GREEDY, drafter.ranking_tau), atol=2e-4
    )


def test_tau_is_fitted_apart_for_greedy_and_sampled_targets() -> None:
    _, drafter = pair()
    drafter.begin(PROMPT, SAMPLED)
    sampled_before = drafter.tau
    drafter.begin(PROMPT, GREEDY)
    before = drafter.tau
    for _ in range(12):  # The target never takes the draft's first choice.
        tree = drafter.propose(24, 6)
        answers = np.array(
            [t[len(t) // 2] if len(t := tree.tokens[tree.parents == i]) else 0 for i in range(-1, len(tree))]
        )
        drafter.observe(Verification(tree, answers, (), int(answers[0])))
    assert drafter.tau > 1.1 * before
    learned = drafter.tau
    drafter.begin([1, 2], SAMPLED)
    assert drafter.tau == sampled_before
    drafter.begin([1, 2], GREEDY)
    assert drafter.tau == learned


def test_labels_belong_to_the_right_nodes() -> None:
    """A target equal to the draft always takes its first choice, so τ must fall; misplaced answers would raise it."""
    model, drafter = pair()
    text = list(PROMPT)
    drafter.begin(text, GREEDY)
    for _ in range(4):
        tree = drafter.propose(40, 6)
        contexts = [text, *([*text, *path] for path in paths_of(tree))]
        answers = np.array([int(plain_logprobs(model, context, GREEDY).argmax()) for context in contexts])
        drafter.observe(Verification(tree, answers, (), int(answers[0])))
        text.append(int(answers[0]))
    assert drafter.tau < 0.2


def test_a_text_longer_than_the_first_cache_is_drafted() -> None:
    model, drafter = pair(max_position_embeddings=2048)
    text = np.random.default_rng(3).integers(0, VOCAB, 1100).tolist()
    drafter.begin(text, GREEDY)
    tree = drafter.propose(6, 3)
    np.testing.assert_allclose(tree.scores, expected_scores(model, text, tree, GREEDY, drafter.ranking_tau), atol=5e-4)


# ---------------------------------------------------------------- texts longer than the draft's context


def remembered(text: list[int], start: int) -> list[int]:
    """Return the first four tokens of a text and those from `start` on."""
    return text if start == 0 else [*text[:4], *text[start:]]


def scores_from(model: PreTrainedModel, text: list[int], start: int, tree: DraftTree, tau: float) -> list[float]:
    """Return what `expected_scores` does for a model that remembers only some tokens, each time read from scratch.

    The noise is that of the places in the whole text.
    """
    scores = []
    for path in paths_of(tree):
        total = 0.0
        for i, token in enumerate(path):
            own = plain_logprobs(model, [*remembered(text, start), *path[:i]], SAMPLED)
            ranked = torch.from_numpy(noised(own, len(text) + i, SAMPLED) / tau)
            total += float(torch.log_softmax(ranked, -1)[token])
        scores.append(total)
    return scores


@pytest.mark.parametrize("family", ["llama", "gpt2"], ids=["rotary", "learned positions"])
def test_a_draft_of_64_positions_drafts_to_any_length(family: str) -> None:
    model, drafter = pair(family, DraftOptions(tree=ModelTreeOptions(width=3)), max_position_embeddings=64)
    rng, text, start = np.random.default_rng(7), list(PROMPT), 0
    drafter.begin(text, SAMPLED)
    while len(text) < 300:
        if len(remembered(text, start)) > 48:  # 16 positions are for the tree
            start = len(text) - 28
        tree = drafter.propose(12, 20)
        assert len(tree) == 12
        assert drafter._draft._cache.trunk == len(remembered(text, start)) <= 48
        expected = scores_from(model, text, start, tree, drafter.ranking_tau)
        np.testing.assert_allclose(tree.scores, expected, atol=5e-4)
        answers = half_agreeing(tree, rng)
        walked = walk(tree.parents, tree.tokens, answers)
        drafter.observe(Verification(tree, answers, walked.accepted, walked.bonus))
        text += [*(int(tree.tokens[i]) for i in walked.accepted), walked.bonus]
    rows = {pool.shape[1] for pair_ in drafter._draft._cache._layers.values() for pool in pair_}
    assert rows == {draft_model.FIRST_ROWS}, "the K and V of 300 tokens take no more room than those of 64"


def test_a_long_prompt_that_goes_on_is_not_read_again() -> None:
    _, drafter = pair(max_position_embeddings=64)
    prompt = np.random.default_rng(1).integers(0, VOCAB, 200).tolist()
    drafter.begin(prompt, GREEDY)
    first = paths_of(drafter.propose(6, 3))
    watch = Watch(drafter)
    drafter.begin([*prompt, 5], GREEDY)
    drafter.propose(6, 1)
    assert sum(watch.forwards) <= 2, "the last token of the prompt and the new one"
    drafter.begin([9, 9], GREEDY)
    drafter.propose(6, 3)
    drafter.begin(prompt, GREEDY)
    assert paths_of(drafter.propose(6, 3)) == first, "a text between them leaves nothing behind"


@given(st.integers(16, 200), st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_a_memory_holds_the_beginning_and_the_end(context: int, lengths: list[int]) -> None:
    memory = DraftMemory(context)
    for length in lengths:
        memory = memory.for_length(length)
        held = memory.of(list(range(length)))
        assert len(held) == memory.rows(length) <= memory.longest < context
        assert held[-1] == length - 1
        assert held == sorted(set(held))
        assert held[: memory.sink] == list(range(min(memory.sink, length)))
        assert memory.for_length(length) == memory


def test_tokens_that_the_draft_lacks_do_not_stop_it() -> None:
    """A target's special tokens may lie beyond the embeddings of a draft of the same family."""
    _, drafter = pair()
    drafter.begin([*PROMPT, VOCAB, VOCAB + 7, 3], GREEDY)
    assert len(drafter.propose(8, 3)) == 8
    tree = drafter.propose(8, 3)
    drafter.observe(Verification(tree, np.full(9, VOCAB + 1), (), VOCAB + 1))
    assert len(drafter.propose(8, 3)) == 8


def test_the_largest_tree_has_all_its_nodes() -> None:
    _, drafter = pair(options=DraftOptions(tree=ModelTreeOptions(beam=256)))
    drafter.begin(PROMPT, SAMPLED)
    tree = drafter.propose(2048, 48)
    assert len(tree) == len(set(paths_of(tree))) == 2048


# ---------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_draft_loads_from_its_directory(folder: Path) -> None:
    drafter = ModelDrafter.load(folder, threads=1)
    assert (drafter.name, drafter.vocab_size) == ("tiny", VOCAB)
    by_hand = pair()[1]
    for loaded in (drafter, by_hand):
        loaded.begin(PROMPT, GREEDY)
    assert drafter.propose(20, 5).tokens.tolist() == by_hand.propose(20, 5).tokens.tolist()


def test_guesses_stay_in_the_vocabulary_of_the_target(folder: Path) -> None:
    drafter = ModelDrafter.load(folder, vocab_size=20)
    for settings in (GREEDY, SAMPLED):
        drafter.begin([1, 2, 3], settings)
        tree = drafter.propose(200, 6)
        assert len(tree) == 200
        assert tree.tokens.max() < 20


def test_a_draft_loaded_by_name_knows_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    tiny_model(vocab_size=30).save_pretrained(target)
    for directory in (folder, target):
        (directory / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    drafter = load_drafter(str(folder), target)
    assert isinstance(drafter, ModelDrafter)
    assert drafter.vocab_size == 30


def test_half_precision_drafts_trees(folder: Path) -> None:
    drafter = ModelDrafter.load(folder, dtype="bfloat16")
    drafter.begin(PROMPT, SAMPLED)
    assert len(drafter.propose(30, 6)) == 30


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        ModelDrafter.load(tmp_path)


def test_a_damaged_model_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ModelError, match="cannot be loaded"):
        ModelDrafter.load(folder)


def test_layers_with_state_outside_k_and_v_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "recurrent")
    with pytest.raises(UnsupportedModel, match="cannot draft trees"):
        ModelDrafter.load(tmp_path / "recurrent")


def test_a_copy_drafts_as_if_it_were_alone() -> None:
    _, drafter = pair()
    settings = SamplingSettings(temperature=1.0, seed=3)
    drafter.begin([1, 2, 3], settings)
    alone = drafter.propose(8, 4)
    other = drafter.copy_for_new_generation()
    assert other.model is drafter.model
    other.begin([4, 5, 6, 7], settings)
    other.propose(8, 4)
    again = drafter.propose(8, 4)
    assert np.array_equal(alone.tokens, again.tokens)
    assert np.array_equal(alone.parents, again.parents)
    other.begin([1, 2, 3], settings)
    same = other.propose(8, 4)
    assert np.array_equal(alone.tokens, same.tokens)
    assert np.array_equal(alone.parents, same.parents)
