"""Calibration: counts outweigh a drafter's own estimate, and the order of scores is kept."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from treeswarm_client.drafters.calibration import Calibration

SCORES = np.log(np.array([0.9, 0.5, 0.2, 0.05, 0.01]))


def after_rounds(truth: float, rounds: int = 200) -> Calibration:
    """Return the calibration of a drafter whose nodes are right `truth` times as often as it estimates."""
    rng = np.random.default_rng(3)
    calibration = Calibration()
    for _ in range(rounds):
        scores = np.log(rng.uniform(0.005, 1.0, 40))
        calibration = calibration.with_round(scores, rng.random(40) < np.exp(scores) * truth)
    return calibration


def test_chances_are_the_drafters_estimates_at_first() -> None:
    assert Calibration().chances(SCORES) == pytest.approx(np.exp(SCORES), rel=0.15)


@pytest.mark.parametrize("truth", [0.0, 0.3, 1.0])
def test_chances_follow_the_hits(truth: float) -> None:
    chances = after_rounds(truth).chances(SCORES[:3])
    assert chances == pytest.approx(np.exp(SCORES[:3]) * truth, rel=0.35, abs=0.03)


def test_a_change_of_the_text_is_followed_within_24_rounds() -> None:
    rng = np.random.default_rng(4)
    calibration = after_rounds(1.0)
    for _ in range(24):
        scores = np.log(rng.uniform(0.005, 1.0, 40))
        calibration = calibration.with_round(scores, np.zeros(40, np.bool_))
    assert (calibration.chances(SCORES) < np.exp(SCORES) * 0.8).all()


@given(
    scores=arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(-60, 0, width=32)), seed=st.integers(0, 9)
)
def test_chances_are_in_bounds_and_keep_the_order(scores: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    learned = Calibration().with_round(scores, rng.random(len(scores)) < 0.5)
    for calibration in (Calibration(), learned):
        chances = calibration.chances(np.sort(scores))
        assert ((chances >= 0) & (chances <= 1)).all()
        assert (np.diff(chances) >= -1e-12).all()


def test_no_nodes_change_nothing() -> None:
    calibration = Calibration()
    assert calibration.with_round(np.empty(0), np.empty(0, np.bool_)) is calibration
    assert len(calibration.chances(np.empty(0))) == 0


def test_chances_of_an_always_wrong_drafter_keep_falling() -> None:
    """They fall although single rounds are forgotten; otherwise one node in thirty would be shipped for ever."""
    calibration, score = Calibration(), np.array([-0.2], np.float32)
    chances = []
    for _ in range(200):
        calibration = calibration.with_round(score, np.array([False]))
        chances.append(float(calibration.chances(score)[0]))
    assert all(later < earlier for earlier, later in itertools.pairwise(chances))
    assert chances[-1] < 0.01


def test_chances_recover_within_16_rounds_of_hits() -> None:
    calibration, score = Calibration(), np.array([-0.2], np.float32)
    for right in [False] * 200 + [True] * 16:
        calibration = calibration.with_round(score, np.array([right]))
    assert calibration.chances(score)[0] > 0.25
