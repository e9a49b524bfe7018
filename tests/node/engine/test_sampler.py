"""The sampler applies Hugging Face's filters, follows the target's distribution, and breaks ties by the lowest id."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from treeswarm.errors import Refused
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_node.engine import sampler
from treeswarm_node.engine.sampler import Sampler, best_tokens, filtered_logprobs, first_argmax

VOCAB = 12
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -9.0])
# A correct sampler falls below this p-value in one of ten thousand runs; the seeds are fixed, so the result is the same
# in every run.
MIN_P_VALUE = 1e-4


def hugging_face_logprobs(logits: torch.Tensor, sampling: SamplingSettings) -> torch.Tensor:
    """Return log p̃ computed by transformers' own warpers."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    logits = TemperatureLogitsWarper(sampling.temperature)(ids, logits)
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(ids, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(ids, logits)
    return torch.log_softmax(logits, -1)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
)
def test_filters_match_hugging_face(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = SamplingSettings(temperature, top_k, top_p)
    # If a token's mass is no larger than the rounding of the sum before it, both results are right.
    unfiltered = filtered_logprobs(logits, SamplingSettings(temperature, top_k))
    sums = unfiltered.double().exp().sort(-1).values.cumsum(-1)
    assume(bool(((sums - (1 - top_p)).abs() > 1e-6).all()))
    torch.testing.assert_close(
        filtered_logprobs(logits, sampling), hugging_face_logprobs(logits, sampling), atol=1e-5, rtol=1e-5
    )


def test_nucleus_wider_than_the_guess_uses_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    sampling = SamplingSettings(1.0, 0, 0.95)
    expected = filtered_logprobs(logits, sampling)
    monkeypatch.setattr(sampler, "NUCLEUS_GUESS", 8)
    assert torch.equal(filtered_logprobs(logits, sampling), expected)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(1.0),
        SamplingSettings(0.7),
        SamplingSettings(1.0, top_k=4),
        SamplingSettings(1.0, top_p=0.8),
        SamplingSettings(1.3, top_k=6, top_p=0.9),
    ],
    ids=str,
)
def test_tokens_follow_the_targets_distribution(sampling: SamplingSettings) -> None:
    """The distribution is checked over seeds at one position, and over positions with one seed."""
    expected = np.exp(hugging_face_logprobs(LOGITS[None].clone(), sampling)[0].double().numpy())
    choose = Sampler(VOCAB).choose
    by_seed = [
        int(
            choose(
                LOGITS[None],
                np.array([17]),
                SamplingSettings(sampling.temperature, sampling.top_k, sampling.top_p, seed),
            )[0][0]
        )
        for seed in range(3000)
    ]
    by_position, _ = choose(LOGITS.repeat(3000, 1), np.arange(3000), sampling)
    possible = expected > 0
    for tokens in (by_seed, by_position):
        counts = np.bincount(tokens, minlength=VOCAB)
        assert counts[~possible].sum() == 0
        expectation = expected[possible] / expected[possible].sum() * len(tokens)
        assert stats.chisquare(counts[possible], expectation).pvalue > MIN_P_VALUE


def test_row_gets_the_same_token_alone_and_in_a_batch() -> None:
    logits = torch.randn(30, VOCAB, generator=torch.Generator().manual_seed(1))
    positions = np.arange(30) % 7
    sampling = SamplingSettings(0.9, 5, 0.95, seed=4)
    batched, logprobs = Sampler(VOCAB).choose(logits, positions, sampling)
    for i in range(30):
        single, logprob = Sampler(VOCAB).choose(logits[i : i + 1], positions[i : i + 1], sampling)
        assert single[0] == batched[i]
        assert logprob[0] == pytest.approx(logprobs[i], abs=1e-6)


def tied_logits(rows: int) -> torch.Tensor:
    """Return rows whose nucleus ends among equal logits, as in 16-bit models, and one row of equal logits.

    The nucleus of the last row needs more of the vocabulary than any guess.
    """
    peaked = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(2)) * 3
    return torch.cat([peaked.bfloat16().float(), torch.zeros(1, 4096)])


def test_nucleus_of_a_row_does_not_depend_on_other_rows() -> None:
    logits = tied_logits(20)
    sampling = SamplingSettings(1.0, 0, 0.9)
    batched = filtered_logprobs(logits, sampling)
    for i in range(len(logits)):
        assert torch.equal(batched[i] > -torch.inf, filtered_logprobs(logits[i : i + 1], sampling)[0] > -torch.inf)


def test_nucleus_keeps_lowest_ids_of_equal_logits() -> None:
    """The nucleus keeps as many tokens as Hugging Face, up to one that the float32 rounding of the mass decides."""
    sampling = SamplingSettings(1.0, 0, 0.9)
    logits = tied_logits(20)
    split = 0
    for row, expected, actual in zip(
        logits, hugging_face_logprobs(logits, sampling), filtered_logprobs(logits, sampling), strict=True
    ):
        kept = actual > -torch.inf
        assert abs(int(kept.sum()) - int((expected > -torch.inf).sum())) <= 1
        level = kept[row == row[kept].min()].tolist()
        assert level == sorted(level, reverse=True)
        assert bool(kept[row > row[kept].min()].all())
        split += not all(level)
    assert split > 5


@pytest.mark.parametrize("temperature", [1e-37, 1e-45, 1e-300])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    """Division overflows here, which once resulted in a token beyond the vocabulary."""
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(3)) * 30
    for sampling in (SamplingSettings(temperature), SamplingSettings(temperature, 5, 0.9)):
        tokens, logprobs = Sampler(VOCAB).choose(logits, np.arange(6), sampling)
        assert tokens.tolist() == logits.argmax(-1).tolist()
        own = torch.log_softmax(logits, -1).amax(-1)  # the model's, whatever the temperature is
        assert logprobs.tolist() == pytest.approx(own.tolist(), abs=1e-5)


def test_overflowing_row_does_not_change_other_rows() -> None:
    logits = torch.cat([LOGITS[None], LOGITS[None] * 3.5e37])
    sampling = SamplingSettings(0.1, 0, 0.95)
    batched = filtered_logprobs(logits, sampling)
    assert torch.equal(batched[:1], filtered_logprobs(logits[:1], sampling))
    assert batched[1].argmax() == 0
    assert batched[1, 0] == 0.0


def test_ties_go_to_the_lowest_id() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert first_argmax(scores).tolist() == [1, 0]
    assert Sampler(4).choose(scores, np.array([0, 1]), SamplingSettings())[0].tolist() == [1, 0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(0, 4), count=st.integers(1, 15))
def test_best_tokens_are_largest_logits_in_order(seed: int, rows: int, count: int) -> None:
    logits = torch.randint(-3, 4, (rows, VOCAB), generator=torch.Generator().manual_seed(seed)).float()
    best = best_tokens(logits, count)
    assert best.shape == (rows, min(count, VOCAB))
    for row, tokens in zip(logits.tolist(), best.tolist(), strict=True):
        assert len(set(tokens)) == len(tokens)
        assert sorted(row, reverse=True)[: len(tokens)] == [row[token] for token in tokens]
        assert tokens == sorted(tokens, key=lambda token: (-row[token], token))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    with pytest.raises(Refused, match="not finite"):
        Sampler(4).choose(logits, np.array([0, 1]), SamplingSettings())
