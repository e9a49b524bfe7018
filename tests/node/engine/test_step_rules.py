"""Rules change the logits of every path as stock transformers changes those of the same text."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.stock_rules import stock_filters, stock_processors, stock_token

from treeswarm.protocol.messages import NO_TOKEN
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import Grammar, RulesRequest, TextRules
from treeswarm.session.grammars import packed_words
from treeswarm.session.logit_edits import RuledText
from treeswarm.session.paths import RowPaths, paths_at_end
from treeswarm_node.engine.edited_logits import edited, unpacked
from treeswarm_node.engine.sampler import Sampler, filtered_logprobs

VOCAB = 9
KNOBS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([0.7, 1.1, 1.3, 2.0]),
    "presence_penalty": st.sampled_from([-1.0, 0.4, 2.0]),
    "frequency_penalty": st.sampled_from([-0.5, 0.3, 1.7]),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3, width=32), min_size=1, max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    "no_repeat_ngram_size": st.integers(1, 4),
    "bad_words": st.lists(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4, unique=True
    ).map(tuple),
    "min_tokens": st.integers(1, 12),
    "min_p": st.sampled_from([0.05, 0.3]),
    "typical_p": st.sampled_from([0.5, 0.9]),
}


@st.composite
def ruled(draw: st.DrawFn) -> TextRules:
    names = draw(st.lists(st.sampled_from(sorted(KNOBS)), min_size=1, max_size=4, unique=True))
    return TextRules(**{name: draw(KNOBS[name]) for name in names}, end_tokens=(1, 4))


@st.composite
def trees(draw: st.DrawFn) -> RowPaths:
    text = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
    nodes = draw(st.integers(0, 9))
    parents = np.array([draw(st.integers(-1, i - 1)) for i in range(nodes)], np.int64)
    tokens = np.array([draw(st.integers(0, VOCAB - 1)) for _ in range(nodes)], np.int64)
    rows = np.array(draw(st.lists(st.integers(-1, nodes - 1), max_size=9)), np.int64)
    return RowPaths(text, len(text), parents, tokens, rows)


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


@settings(max_examples=150, deadline=None)
@given(rules=ruled(), paths=trees(), prompt=st.integers(0, 20), seed=st.integers(0, 99))
def test_edits_are_those_of_stock_processors(rules: TextRules, paths: RowPaths, prompt: int, seed: int) -> None:
    prompt = min(prompt, paths.length)
    logits = random_logits(len(paths), seed)
    before = logits.clone()
    with edited(logits, RuledText(RulesRequest(rules, prompt)).edits(paths)) as ruled_logits:
        for row, context in enumerate(paths.whole()):
            expected = stock_processors(rules, prompt)(torch.tensor([context]), before[row : row + 1])
            assert torch.equal(ruled_logits[row : row + 1], expected)
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(rules=ruled(), paths=trees(), seed=st.integers(0, 99), heat=st.sampled_from([0.0, 0.6, 1.4]))
def test_sampler_chooses_what_stock_transformers_chooses(
    rules: TextRules, paths: RowPaths, seed: int, heat: float
) -> None:
    prompt, sampling = paths.length // 2, SamplingSettings(heat, top_k=6 if seed % 2 else 0, seed=seed)
    logits, contexts = random_logits(len(paths), seed), paths.whole()
    expected = [
        stock_token(context, row, rules, prompt, sampling) for context, row in zip(contexts, logits, strict=True)
    ]
    own = torch.log_softmax(logits, -1)
    positions = np.array([len(context) for context in contexts], np.int64)
    edits = RuledText(RulesRequest(rules, prompt)).edits(paths)
    tokens, logprobs = Sampler(VOCAB).choose(logits, positions, sampling, edits)
    assert tokens.tolist() == [NO_TOKEN if token is None else token for token in expected]
    for row, token in enumerate(expected):
        assert token is None or logprobs[row] == pytest.approx(float(own[row, token]), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(min_p=st.floats(0, 1), typical_p=st.floats(0.05, 1), top_k=st.integers(0, 9), seed=st.integers(0, 999))
def test_min_p_and_typical_p_match_hugging_face(min_p: float, typical_p: float, top_k: int, seed: int) -> None:
    rules, sampling = TextRules(min_p=min_p, typical_p=typical_p), SamplingSettings(0.8, top_k)
    logits = random_logits(4, seed)
    expected = torch.log_softmax(stock_filters(sampling, rules)(torch.zeros(4, 1, dtype=torch.long), logits), -1)
    assert torch.equal(filtered_logprobs(logits, sampling, rules), expected)


def test_text_is_counted_as_it_grows_and_anew_after_a_repair() -> None:
    """The same object gives the same edits as a new one, whatever it has seen before."""
    rules = TextRules(repetition_penalty=1.5, frequency_penalty=0.5, no_repeat_ngram_size=2, logit_bias=((3, 1.0),))
    request = RulesRequest(rules, 2)
    text, kept, random = [1, 2, 3], RuledText(request), np.random.default_rng(0)
    for step in range(40):
        text += random.integers(0, VOCAB, 2).tolist()
        if step % 7 == 6:
            text = text[: len(text) // 2] or [1]
        logits = random_logits(1, step)
        edits = [ruled_text.edits(paths_at_end(text)) for ruled_text in (kept, RuledText(request))]
        results = []
        for edit in edits:
            with edited(logits, edit) as changed:
                results.append(changed.clone())
        assert torch.equal(*results)


def packed(allowed: list[list[int]], vocab_size: int) -> NDArray[np.uint32]:
    masks = np.zeros((len(allowed), packed_words(vocab_size)), np.uint32)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            masks[row, token // 32] |= np.uint32(1 << token % 32)
    return masks


def test_masks_exclude_tokens_beyond_the_first_word() -> None:
    vocab_size = 70
    text = RuledText(RulesRequest(TextRules(grammar=Grammar("json_object")), 1))
    masks = packed([[69], [3, 40], []], vocab_size)
    paths = replace(paths_at_end([0]), rows=np.array([-1, -1, -1]))
    logits = torch.arange(vocab_size, 0, -1).float().repeat(3, 1)
    expected = [float(torch.log_softmax(logits[0], -1)[token]) for token in (69, 3)]
    tokens, logprobs = Sampler(vocab_size).choose(
        logits, np.array([1, 1, 1]), SamplingSettings(), text.edits(paths, masks)
    )
    assert tokens.tolist() == [69, 3, NO_TOKEN]
    assert logprobs[:2].tolist() == pytest.approx(expected, abs=1e-5)


def test_rows_without_any_token_are_named_in_sampled_texts_too() -> None:
    text, masks = RuledText(RulesRequest(TextRules(grammar=Grammar("json_object")), 1)), packed([[], [5]], VOCAB)
    paths = replace(paths_at_end([0]), rows=np.array([-1, -1]))
    for sampling in (SamplingSettings(1.0), SamplingSettings(0.7, top_k=3, top_p=0.9)):
        tokens, logprobs = Sampler(VOCAB).choose(
            torch.zeros(2, VOCAB), np.array([1, 1]), sampling, text.edits(paths, masks)
        )
        assert tokens.tolist() == [NO_TOKEN, 5]
        assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("vocab_size", [64, 70])
def test_devices_unpack_masks_alike(vocab_size: int) -> None:
    masks = np.random.default_rng(0).integers(0, 2**32, (3, packed_words(vocab_size)), dtype=np.uint32)
    on_cpu = unpacked(masks, vocab_size, torch.device("cpu"))
    assert on_cpu.tolist() == [
        [bool(row[t // 32] >> (t % 32) & 1) for t in range(vocab_size)] for row in masks.tolist()
    ]
    assert unpacked(masks, vocab_size, torch.device("meta")).shape == (3, vocab_size)
    if torch.cuda.is_available():
        assert torch.equal(unpacked(masks, vocab_size, torch.device("cuda")).cpu(), on_cpu)


def test_complete_grammar_is_stronger_than_the_least_length() -> None:
    rules = TextRules(grammar=Grammar("json_object"), min_tokens=9, end_tokens=(2,))
    text, masks = RuledText(RulesRequest(rules, 1)), packed([[2], [2, 5]], VOCAB)
    paths = replace(paths_at_end([0]), rows=np.array([-1, -1]))
    tokens, _ = Sampler(VOCAB).choose(
        torch.zeros(2, VOCAB), np.array([1, 1]), SamplingSettings(), text.edits(paths, masks)
    )
    assert tokens.tolist() == [2, 5]
