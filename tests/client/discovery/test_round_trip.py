"""How long to wait: never too short for what was seen, never below the floor, and soon right again after a change."""

from hypothesis import given
from hypothesis import strategies as st

from treeswarm_client.discovery.round_trip import RoundTrip

seconds = st.floats(0, 1e4, allow_nan=False)


def after(*samples: float) -> RoundTrip:
    trip = RoundTrip()
    for sample in samples:
        trip = trip.with_sample(sample)
    return trip


def test_nothing_seen_means_the_floor() -> None:
    assert RoundTrip().deadline(2.5) == 2.5


def test_the_first_sample_is_as_in_rfc_6298() -> None:
    assert after(0.2) == RoundTrip(0.2, 0.1, 1)
    assert after(0.2).deadline(0.0) == 0.2 + 4 * 0.1


def test_the_second_is_too() -> None:
    trip = after(0.2, 0.4)
    assert trip.deviation == 0.75 * 0.1 + 0.25 * 0.2
    assert trip.smoothed == 0.875 * 0.2 + 0.125 * 0.4


@given(st.lists(seconds, min_size=1, max_size=50), st.floats(0, 1e4))
def test_a_deadline_is_finite_and_between_its_bounds(samples: list[float], least: float) -> None:
    trip = after(*samples)
    assert min(samples) - 1e-6 <= trip.smoothed <= max(samples) + 1e-6
    assert 0 <= trip.deviation <= max(samples) + 1e-6
    assert max(least, trip.smoothed) <= trip.deadline(least) <= max(least, 5 * max(samples) + 1e-3)
    assert trip.samples == len(samples)


@given(seconds, st.integers(30, 100))
def test_a_steady_line_is_waited_for_little_longer_than_it_takes(usual: float, count: int) -> None:
    assert after(*[usual] * count).deadline(0.0) <= usual * 1.01 + 1e-6


@given(st.floats(1e-3, 10), st.floats(1.0, 100))
def test_a_line_that_became_slower_is_believed_within_a_few_samples(usual: float, times: float) -> None:
    trip = after(*[usual] * 50)
    for _ in range(3):
        trip = trip.with_sample(usual * times)
    assert trip.deadline(0.0) >= usual * times
