"""The estimate of τ recovers the temperature that generated the labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from treeswarm_client.drafters.tau import GRID, TauEstimate


def labels(tau: float, count: int, seed: int, candidates: int = 64) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores [count, candidates], best first, and choices drawn from softmax(scores / tau)."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.normal(size=(count, candidates)) * 2, axis=1)
    chosen = (scores / tau + rng.gumbel(size=scores.shape)).argmax(1)
    return scores.astype(np.float32), chosen


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.8, 1.0, 1.4])
@pytest.mark.parametrize("prior", [0.5, 0.8])
def test_tau_is_the_temperature_that_generated_the_labels(tau: float, prior: float) -> None:
    fitted = TauEstimate.fresh(prior)
    for batch in range(20):
        fitted = fitted.with_labels(*labels(tau, 100, batch))
    assert fitted.value == pytest.approx(tau, rel=0.08)


@given(prior=st.floats(0.15, 2.0))
def test_without_labels_tau_is_the_prior(prior: float) -> None:
    assert TauEstimate.fresh(prior).value == pytest.approx(prior, rel=1e-3)


def test_few_labels_move_tau_less_than_many() -> None:
    few = TauEstimate.fresh(0.5).with_labels(*labels(1.2, 5, 0)).value
    many = TauEstimate.fresh(0.5).with_labels(*labels(1.2, 500, 0)).value
    assert 0.4 < few < 0.9 < many


def test_tau_follows_a_text_that_changes() -> None:
    fitted = TauEstimate.fresh(0.5)
    for batch in range(100):
        fitted = fitted.with_labels(*labels(0.4, 100, batch))
    for batch in range(100):
        fitted = fitted.with_labels(*labels(1.1, 100, batch))
    assert fitted.value == pytest.approx(1.1, rel=0.1)


def test_no_labels_leave_tau_as_it_is() -> None:
    fitted = TauEstimate.fresh(0.5).with_labels(*labels(0.9, 200, 1))
    assert fitted.with_labels(np.empty((0, 64), np.float32), np.empty(0, np.int64)).value == fitted.value


@given(
    seed=st.integers(0, 1000),
    offset=st.floats(-1e4, 1e4),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    count=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_tau_stays_in_bounds_for_any_labels(seed: int, offset: float, scale: float, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (offset + scale * rng.normal(size=(count, 16))).astype(np.float32)
    value = TauEstimate.fresh(0.5).with_labels(scores, rng.integers(0, 16, count)).value
    assert GRID[0] <= value <= GRID[-1]


def test_an_offset_of_all_scores_changes_nothing() -> None:
    scores, chosen = labels(0.7, 300, 2)
    shifted = scores + np.arange(300, dtype=np.float32)[:, None] % 7
    assert TauEstimate.fresh(0.5).with_labels(shifted, chosen).value == pytest.approx(
        TauEstimate.fresh(0.5).with_labels(scores, chosen).value, rel=1e-4
    )
