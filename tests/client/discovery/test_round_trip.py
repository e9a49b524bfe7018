"""Deadlines cover what was measured, are never below the least, and follow a change within a few samples."""

from hypothesis import given
from hypothesis import strategies as st

from treeswarm_client.discovery.round_trip import LEAST_SILENCE_S, PING_EVERY_S, Heartbeat, RoundTrip

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


# ---------------------------------------------------------------- heartbeats


def heartbeat(*late_s: float, every_s: float = PING_EVERY_S) -> Heartbeat:
    """Return the heartbeat of a node whose pongs came so many seconds late, the last one at time 0."""
    beat = Heartbeat(heard_at=-every_s * len(late_s))
    for number, late in enumerate(late_s):
        at = every_s * (number + 1 - len(late_s))
        beat.hear(at)
        beat.add_round_trip(late, at)
    return beat


def noticed_after(beat: Heartbeat) -> float:
    """Return the seconds of silence after which the node is overdue."""
    return next(at / 10 for at in range(1000) if beat.is_overdue(at / 10))


def test_a_dead_node_of_a_quiet_machine_is_noticed_soon() -> None:
    assert noticed_after(heartbeat(*[0.03] * 100)) <= PING_EVERY_S + LEAST_SILENCE_S + 0.1


def test_a_loaded_node_may_be_silent_for_twice_its_latest_pong() -> None:
    grows = [0.1, 0.4, 1.0, 2.0, 3.0, 5.0, 6.0, 3.0, 4.0]
    beat = heartbeat(0.03)
    for now, late in enumerate(grows, start=1):
        assert noticed_after(beat) > late, late
        beat = heartbeat(0.03, *grows[:now])
    assert 12.0 < noticed_after(beat) < 40.0


def test_a_late_pong_is_remembered_for_a_minute_not_for_ever() -> None:
    early = heartbeat(5.0, *[0.03] * 20)
    assert noticed_after(early) > 10.0
    assert noticed_after(heartbeat(5.0, *[0.03] * 200)) <= PING_EVERY_S + LEAST_SILENCE_S + 0.1


def test_own_lateness_is_not_the_nodes_silence() -> None:
    beat = heartbeat(*[0.03] * 10)
    beat.excuse(5.0)
    assert not beat.is_overdue(6.0)
    assert beat.is_overdue(8.0)
    beat.hear(8.0)
    assert not beat.is_overdue(8.0 + 6.4), "it was silent for 3 s before"
    assert beat.is_overdue(8.0 + 6.6), "an excuse holds for one silence"
