"""τ is found again where it is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from treeswarm_client.drafters.tau import GRID, TauEstimate


def labels(tau: float, count: int, seed: int, candidates: int = 64) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores [count, candidates], best first, and choices drawn from softmax(scores / tau)."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.normal(size=(count, candidates)) * 2, axis=1)
    chosen = (scores / tau + rng.gumbel(size=scores.shape)).argmax(1)
    return scores.astype(np.float32), chosen


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.8, 1.0, 1.4])
@pytest.mark.parametrize("prior", [0.5, 0.8])
def test_it_finds_the_temperature_that_made_the_labels(tau: float, prior: float) -> None:
    fitted = TauEstimate.fresh(prior)
    for batch in range(20):
        fitted = fitted.learned(*labels(tau, 100, batch))
    assert fitted.value == pytest.approx(tau, rel=0.08)


@given(prior=st.floats(0.15, 2.0))
def test_without_labels_it_is_the_prior(prior: float) -> None:
    assert TauEstimate.fresh(prior).value == pytest.approx(prior, rel=1e-3)


def test_a_few_labels_move_it_less_than_many() -> None:
    few = TauEstimate.fresh(0.5).learned(*labels(1.2, 5, 0)).value
    many = TauEstimate.fresh(0.5).learned(*labels(1.2, 500, 0)).value
    assert 0.4 < few < 0.9 < many


def test_it_follows_a_text_that_changes() -> None:
    fitted = TauEstimate.fresh(0.5)
    for batch in range(100):
        fitted = fitted.learned(*labels(0.4, 100, batch))
    for batch in range(100):
        fitted = fitted.learned(*labels(1.1, 100, batch))
    assert fitted.value == pytest.approx(1.1, rel=0.1)


def test_learning_nothing_forgets_nothing() -> None:
    fitted = TauEstimate.fresh(0.5).learned(*labels(0.9, 200, 1))
    assert fitted.learned(np.empty((0, 64), np.float32), np.empty(0, np.int64)).value == fitted.value


@given(
    seed=st.integers(0, 1000),
    offset=st.floats(-1e4, 1e4),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    count=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_it_stays_in_bounds_whatever_it_is_taught(seed: int, offset: float, scale: float, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (offset + scale * rng.normal(size=(count, 16))).astype(np.float32)
    value = TauEstimate.fresh(0.5).learned(scores, rng.integers(0, 16, count)).value
    assert GRID[0] <= value <= GRID[-1]


def test_scores_of_another_zero_point_teach_the_same() -> None:
    scores, chosen = labels(0.7, 300, 2)
    shifted = scores + np.arange(300, dtype=np.float32)[:, None] % 7
    assert TauEstimate.fresh(0.5).learned(shifted, chosen).value == pytest.approx(
        TauEstimate.fresh(0.5).learned(scores, chosen).value, rel=1e-4
    )
