"""Bans: how long a client avoids a node that failed it, and what ends a ban."""

from treeswarm.topology.bans import FIRST_BAN_S, FORGET_S, LONGEST_BAN_S, LONGEST_RETRY_S, BanList


def end_of_ban(bans: BanList, node: str) -> float | None:
    """Return when the last ban of `node` ends or ended; None if no failure of it is remembered."""
    ban = bans.bans.get(node)
    return ban.until if ban else None


def test_ban_duration_doubles_up_to_a_cap() -> None:
    bans, now, durations = BanList(), 0.0, []
    for _ in range(2000):
        bans = bans.with_failure("a", now)
        until = end_of_ban(bans, "a")
        assert until is not None
        durations.append(until - now)
        now = until
    assert durations[:4] == [15.0, 30.0, 60.0, 120.0]
    assert max(durations) == durations[-1] == LONGEST_BAN_S


def test_a_ban_that_is_over_still_doubles_the_next_one() -> None:
    bans = BanList().with_failure("a", 100.0)
    assert bans.banned(100.0) == {"a"}
    assert bans.banned(100.0 + FIRST_BAN_S) == frozenset()
    assert end_of_ban(bans.with_failure("a", 120.0), "a") == 120.0 + 2 * FIRST_BAN_S


def test_failures_during_a_ban_count_once() -> None:
    bans = BanList().with_failure("a", 0.0)
    for session in range(32):
        bans = bans.with_failure("a", session / 10)
    assert end_of_ban(bans, "a") == FIRST_BAN_S


def test_an_answer_after_a_ban_makes_the_next_one_short_again() -> None:
    bans = BanList().with_failure("a", 0.0).with_failure("b", 0.0)
    answered = bans.with_answer("a", FIRST_BAN_S)
    assert end_of_ban(answered, "a") is None
    assert end_of_ban(answered.with_failure("a", 20.0), "a") == 20.0 + FIRST_BAN_S
    assert end_of_ban(answered.with_failure("b", 20.0), "b") == 20.0 + 2 * FIRST_BAN_S


def test_an_answer_during_a_ban_does_not_end_it() -> None:
    """It belongs to a session that began before the failure: another one of the same node's would fail again."""
    bans = BanList().with_failure("a", 0.0).with_failure("b", 0.0)
    assert bans.with_answer("a", 1.0).banned(1.0) == {"a", "b"}
    assert end_of_ban(bans.with_answer("a", 1.0).with_failure("a", 20.0), "a") == 20.0 + 2 * FIRST_BAN_S


def test_a_failure_is_forgotten_after_a_long_time_without_one() -> None:
    bans = BanList().with_failure("a", 0.0).with_failure("b", 0.0)
    late = FIRST_BAN_S + FORGET_S
    assert end_of_ban(bans.with_failure("a", late), "a") == late + FIRST_BAN_S
    assert end_of_ban(bans.with_failure("a", late), "b") is None
    assert end_of_ban(bans.with_answer("a", late), "b") is None


def test_a_ban_list_is_never_changed_in_place() -> None:
    before = BanList().with_failure("a", 0.0)
    before.with_failure("b", 0.0)
    before.with_answer("a", FIRST_BAN_S)
    assert before.banned(1.0) == {"a"}
    assert before.with_answer("unknown", 0.0) is before


def test_a_banned_node_may_be_tried_soon_and_then_more_rarely() -> None:
    bans, now, pauses = BanList(), 0.0, []
    bans = bans.with_failure("a", now)
    assert bans.last_resort(now) == frozenset()
    while now < FIRST_BAN_S:
        retry_at = bans.bans["a"].retry_at
        pauses.append(retry_at - now)
        assert bans.with_failure("a", retry_at - 0.1) is bans, "a session from before says nothing about the try"
        now = retry_at
        if now < FIRST_BAN_S:
            assert bans.last_resort(now) == {"a"}
            bans = bans.with_failure("a", now)
            assert end_of_ban(bans, "a") == FIRST_BAN_S, "the ban itself stays as it was"
    assert pauses == [1.0, 2.0, 4.0, LONGEST_RETRY_S]
    assert bans.last_resort(FIRST_BAN_S) == frozenset(), "the ban is over"
