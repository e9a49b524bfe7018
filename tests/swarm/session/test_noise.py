"""The noise is Philox as written out from its paper, and agrees with the published test vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import NoiseRows, gumbel_row, noise_bits

VECTORS = json.loads((Path(__file__).parents[3] / "proto" / "noise_vectors.json").read_text())
U64 = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Return one block of four u64 of Philox4x64-10, as its paper defines it."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(a * 0xD2E7470EE14C6C93, 2**64)
        high1, low1 = divmod(c * 0xCA5A826395121157, 2**64)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & U64, (k1 + 0xBB67AE8584CAA73B) & U64
    return [a, b, c, d]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, U64),
    sample=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**22),
    vocab=st.integers(1, 40),
)
def test_bits_are_philox_at_the_counter_of_the_contract(seed: int, sample: int, position: int, vocab: int) -> None:
    bits = noise_bits(seed, sample, position, vocab)
    for token in range(vocab):
        assert bits[token] == philox([token >> 2, position, 0, 0], [seed, sample])[token & 3]


@pytest.mark.parametrize("vector", VECTORS["vectors"])
def test_noise_agrees_with_the_published_vectors(vector: dict[str, int]) -> None:
    arguments = (int(vector["seed"]), vector["sample"], vector["position"])
    token = vector["token"]
    assert str(noise_bits(*arguments, token + 1)[token]) == vector["u64"]
    assert gumbel_row(*arguments, token + 1)[token] == pytest.approx(vector["gumbel"], rel=1e-6)


@given(vocab=st.integers(2, 300))
def test_values_of_a_row_do_not_depend_on_its_length(vocab: int) -> None:
    assert np.array_equal(gumbel_row(5, 0, 9, 300)[:vocab], gumbel_row(5, 0, 9, vocab))


def test_rows_are_gumbel_and_uncorrelated_between_arguments() -> None:
    row = gumbel_row(1, 0, 0, 20_000)
    assert stats.kstest(row, stats.gumbel_r.cdf).pvalue > 0.01
    for other in ((2, 0, 0), (1, 1, 0), (1, 0, 1)):
        assert abs(np.corrcoef(row, gumbel_row(*other, 20_000))[0, 1]) < 0.03


def test_the_cache_returns_the_same_rows_and_stays_small() -> None:
    rows = NoiseRows(50)
    settings = SamplingSettings(temperature=1.0, seed=3)
    for position in [*range(200), *range(200)]:
        assert np.array_equal(rows.row(settings, position), gumbel_row(3, 0, position, 50))
    assert len(rows._rows) <= 64
