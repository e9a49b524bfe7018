"""Calibration: what was observed outweighs what a drafter thinks of itself, and order is kept."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from treeswarm_client.drafters.calibration import Calibration

SCORES = np.log(np.array([0.9, 0.5, 0.2, 0.05, 0.01]))


def after_rounds(truth: float, rounds: int = 200) -> Calibration:
    """A drafter whose nodes are hit `truth` times as often as it thinks."""
    rng = np.random.default_rng(3)
    calibration = Calibration()
    for _ in range(rounds):
        scores = np.log(rng.uniform(0.005, 1.0, 40))
        calibration = calibration.learned(scores, rng.random(40) < np.exp(scores) * truth)
    return calibration


def test_a_drafter_is_believed_at_first() -> None:
    assert Calibration().chances(SCORES) == pytest.approx(np.exp(SCORES), rel=0.15)


@pytest.mark.parametrize("truth", [0.0, 0.3, 1.0])
def test_what_was_seen_counts(truth: float) -> None:
    found = after_rounds(truth).chances(SCORES[:3])
    assert found == pytest.approx(np.exp(SCORES[:3]) * truth, rel=0.35, abs=0.03)


def test_a_text_that_turns_is_followed_within_some_rounds() -> None:
    rng = np.random.default_rng(4)
    calibration = after_rounds(1.0)
    for _ in range(24):
        scores = np.log(rng.uniform(0.005, 1.0, 40))
        calibration = calibration.learned(scores, np.zeros(40, np.bool_))
    assert (calibration.chances(SCORES) < np.exp(SCORES) * 0.8).all()


@given(
    scores=arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(-60, 0, width=32)), seed=st.integers(0, 9)
)
def test_chances_are_chances_and_keep_the_order(scores: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    learned = Calibration().learned(scores, rng.random(len(scores)) < 0.5)
    for calibration in (Calibration(), learned):
        chances = calibration.chances(np.sort(scores))
        assert ((chances >= 0) & (chances <= 1)).all()
        assert (np.diff(chances) >= -1e-12).all()


def test_no_nodes_teach_nothing() -> None:
    calibration = Calibration()
    assert calibration.learned(np.empty(0), np.empty(0, np.bool_)) is calibration
    assert len(calibration.chances(np.empty(0))) == 0


def test_a_drafter_that_is_never_right_is_believed_ever_less() -> None:
    """Though single rounds are forgotten: else one node in thirty would be shipped for ever."""
    calibration, score = Calibration(), np.array([-0.2], np.float32)
    believed = []
    for _ in range(200):
        calibration = calibration.learned(score, np.array([False]))
        believed.append(float(calibration.chances(score)[0]))
    assert all(later < earlier for earlier, later in itertools.pairwise(believed))
    assert believed[-1] < 0.01


def test_one_that_is_right_again_is_believed_within_some_rounds() -> None:
    calibration, score = Calibration(), np.array([-0.2], np.float32)
    for right in [False] * 200 + [True] * 16:
        calibration = calibration.learned(score, np.array([right]))
    assert calibration.chances(score)[0] > 0.25
