"""A published head proposes as long as it guesses better than n-grams, and says why it stops."""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.node.conftest import CPU, tiny_model

from treeswarm.errors import ModelError
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator import load_check
from treeswarm_node.speculator.load_check import check_at_load, guess_along
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest
from treeswarm_node.speculator.self_check import (
    CHECKED_TOKENS,
    CheckedSpeculator,
    CheckedText,
    HeadComparison,
    HeadVerdict,
    right_tokens,
)

GREEDY = SamplingSettings()


@dataclass
class Oracle:
    """Guesses the next tokens of a text that it knows, `luck` of them right."""

    text: Sequence[int]
    luck: int
    name: str = "eagle3"
    agreement: float = 0.0
    taps: tuple[int, ...] = (3,)
    window: int = 64
    proposed: list[int] = field(default_factory=list)
    """Position of each root below which it proposed."""

    def new_memory(self) -> None:
        return None

    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        self.proposed.append(request.root_position)
        following = list(self.text[request.root_position + 1 :][:4])
        tokens = [token if i < self.luck else -5 for i, token in enumerate(following)]
        for count in range(1, len(tokens) + 1):
            scores = -np.arange(count, dtype=np.float32)
            yield SpeculatedTree(np.arange(-1, count - 1), np.array(tokens[:count], np.int64), scores)


def run(speculator: CheckedSpeculator, text: Sequence[int], stride: int = 3, end: int | None = None) -> list[int]:
    """Let the text grow by `stride` tokens per proposal; return the number of nodes of each proposal."""
    memory, read, sizes = speculator.new_memory(), 0, []
    for known in range(8, end or len(text), stride):
        following = np.array(text[read + 1 : known], np.int64)
        asked = SpeculationRequest(memory, read, torch.zeros(len(following), 1), following, GREEDY, 64)
        *_, tree = speculator.propose(asked)
        sizes.append(len(tree))
        read = known - 1
    return sizes


def random_text(count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, 50_000, count).tolist()


def repeated_text(count: int) -> list[int]:
    return (random_text(12) * (count // 12 + 1))[:count]


def test_a_head_that_beats_ngrams_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    text = random_text(400)
    speculator = CheckedSpeculator(Oracle(text, luck=1), "org/head")
    with caplog.at_level(logging.INFO):
        sizes = run(speculator, text)
    assert set(sizes[:-2]) == {4}
    assert speculator.comparison.verdict is HeadVerdict.PASSED
    assert (speculator.name, speculator.agreement) == ("eagle3", 1.0)
    assert "the head in 'org/head' is better than n-grams: over 20" in caplog.text


@pytest.mark.parametrize(("text", "luck"), [(random_text(400), 0), (repeated_text(400), 1)])
def test_a_head_that_does_not_beat_ngrams_proposes_nothing_after_the_check(
    text: list[int], luck: int, caplog: pytest.LogCaptureFixture
) -> None:
    head = Oracle(text, luck)
    speculator = CheckedSpeculator(head, "org/head")
    with caplog.at_level(logging.WARNING):
        sizes = run(speculator, text)
    assert speculator.comparison.verdict is HeadVerdict.REFUSED
    assert (speculator.name, speculator.agreement) == ("", 0.0), "the node's record names no speculator any more"
    checked = sizes.index(0)
    assert 0 < head.proposed[-1] - head.proposed[0] < CHECKED_TOKENS
    assert sizes[checked:] == [0] * (len(sizes) - checked), "clients get an empty tree at once"
    assert caplog.text.count("the head in 'org/head' proposes no more, for it is no better than n-grams: over 20") == 1


def test_the_check_goes_on_over_several_sessions() -> None:
    text = random_text(400)
    speculator = CheckedSpeculator(Oracle(text, luck=2), "org/head")
    run(speculator, text, end=110)
    assert speculator.comparison.verdict is HeadVerdict.OPEN
    assert speculator.comparison.tokens < CHECKED_TOKENS
    run(speculator, text, end=150)
    assert speculator.comparison.verdict is HeadVerdict.PASSED


def test_both_are_compared_below_the_same_roots() -> None:
    """The counts are those of all roots whose continuation is known, by hand."""
    text = repeated_text(120)
    speculator = CheckedSpeculator(Oracle(text, luck=1), "org/head")
    run(speculator, text, stride=5, end=101)
    roots = range(7, 98, 5)
    settled = [root for root in roots if root + 9 < 98]
    assert speculator.comparison.head == len(settled)
    # From the second repetition on, n-grams know all nine tokens; before, they know none.
    assert speculator.comparison.ngrams == 9 * sum(root >= 13 for root in settled)
    assert speculator.comparison.tokens == roots[-1] - roots[0]


def test_right_tokens_lie_on_one_path() -> None:
    tree = SpeculatedTree(np.array([-1, 0, -1, 2]), np.array([5, 6, 7, 8]), np.zeros(4, np.float32))
    assert right_tokens(tree, [5, 6, 9]) == 2
    assert right_tokens(tree, [7, 6]) == 1
    assert right_tokens(tree, [7, 8]) == 2
    assert right_tokens(tree, [6]) == right_tokens(tree, []) == 0


def test_a_repair_or_a_gap_begins_the_text_anew() -> None:
    text, comparison = CheckedText(), HeadComparison()
    assert text.read(1, np.array([4, 5, 6])) == 0
    assert text.read(4, np.array([7, 8])) == 2
    assert text.read(3, np.array([6, 7, 8, 9])) == 1, "rows that are read again are not counted again"
    assert text.end == 7
    assert text.read(12, np.array([1, 2])) == 0
    text.settle(comparison)
    assert (text.end, comparison.head) == (14, 0)


# ---------------------------------------------------------------- at load


@pytest.fixture
def whole() -> SpanModel:
    return SpanModel(LoadedSpan(copy.deepcopy(tiny_model("llama")), Span(0, 4), torch.float32, CPU), 2048)


def stock_text(prompt: list[int], count: int) -> list[int]:
    model: torch.nn.Module = tiny_model("llama")
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text


def test_the_check_at_load_follows_the_models_own_text(whole: SpanModel) -> None:
    prompt = [5, 9, 30, 7]
    expected = stock_text(prompt, 20)
    head = Oracle(expected, luck=4)
    speculator = CheckedSpeculator(head, "org/head")
    *_, text = guess_along(whole, speculator, prompt, 20)
    assert text == expected
    assert head.proposed == list(range(4, 24, 3))
    assert whole.store.free_tokens == 2048, "nothing is left in the KV cache"


class Letters:
    """Encodes each letter by itself."""

    def encode(self, text: str) -> "Letters":
        self.ids = [ord(letter) % 199 for letter in text]
        return self


@pytest.mark.parametrize("seconds_per_call", [0.0, 15.0])
def test_a_bad_head_is_refused_at_load(
    seconds_per_call: float, whole: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_check, "load_tokenizer", lambda folder: Letters())
    speculator = CheckedSpeculator(Oracle([0] * 500, luck=0), "org/head")
    now = iter(np.arange(0, 1e9, seconds_per_call) if seconds_per_call else [0.0] * 10_000)
    if seconds_per_call:  # the check takes too long here, and goes on with the texts of sessions
        check_at_load(whole, speculator, Path("model"), clock=lambda: float(next(now)))
        assert speculator.comparison.verdict is HeadVerdict.OPEN
    else:
        with pytest.raises(ModelError, match="the head in 'org/head' is no better than n-grams"):
            check_at_load(whole, speculator, Path("model"), clock=lambda: next(now))
