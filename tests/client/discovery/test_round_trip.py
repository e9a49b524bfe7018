"""Deadlines cover what was measured, are never below the least, and follow a change within a few samples."""

from hypothesis import given
from hypothesis import strategies as st

from treeswarm_client.discovery.round_trip import RoundTrip

seconds = st.floats(0, 1e4, allow_nan=False)


def estimate_after(*samples: float) -> RoundTrip:
    estimate = RoundTrip()
    for sample in samples:
        estimate = estimate.with_sample(sample)
    return estimate


def test_deadline_without_samples_is_the_least() -> None:
    assert RoundTrip().deadline(2.5) == 2.5


def test_the_first_sample_follows_rfc_6298() -> None:
    assert estimate_after(0.2) == RoundTrip(0.2, 0.1, 1)
    assert estimate_after(0.2).deadline(0.0) == 0.2 + 4 * 0.1


def test_the_second_sample_follows_rfc_6298() -> None:
    estimate = estimate_after(0.2, 0.4)
    assert estimate.deviation == 0.75 * 0.1 + 0.25 * 0.2
    assert estimate.smoothed == 0.875 * 0.2 + 0.125 * 0.4


@given(st.lists(seconds, min_size=1, max_size=50), st.floats(0, 1e4))
def test_a_deadline_is_finite_and_between_its_bounds(samples: list[float], least: float) -> None:
    estimate = estimate_after(*samples)
    assert min(samples) - 1e-6 <= estimate.smoothed <= max(samples) + 1e-6
    assert 0 <= estimate.deviation <= max(samples) + 1e-6
    assert max(least, estimate.smoothed) <= estimate.deadline(least) <= max(least, 5 * max(samples) + 1e-3)
    assert estimate.samples == len(samples)


@given(seconds, st.integers(30, 100))
def test_the_deadline_of_a_steady_link_is_close_to_its_time(usual: float, count: int) -> None:
    assert estimate_after(*[usual] * count).deadline(0.0) <= usual * 1.01 + 1e-6


@given(st.floats(1e-3, 10), st.floats(1.0, 100))
def test_the_deadline_follows_a_slower_link_in_three_samples(usual: float, times: float) -> None:
    estimate = estimate_after(*[usual] * 50)
    for _ in range(3):
        estimate = estimate.with_sample(usual * times)
    assert estimate.deadline(0.0) >= usual * times
