"""Who failed is left alone, longer each time, and not for ever."""

from treeswarm.topology.bans import FIRST_BAN_S, FORGET_S, LONGEST_BAN_S, BanList


def test_bans_double_up_to_a_cap() -> None:
    bans, now, lengths = BanList(), 0.0, []
    for _ in range(2000):
        bans = bans.failed("a", now)
        until = bans.until("a")
        assert until is not None
        lengths.append(until - now)
        now = until
    assert lengths[:4] == [15.0, 30.0, 60.0, 120.0]
    assert max(lengths) == lengths[-1] == LONGEST_BAN_S


def test_a_ban_ends_by_itself_but_is_remembered() -> None:
    bans = BanList().failed("a", 100.0)
    assert bans.banned(100.0) == {"a"}
    assert bans.banned(100.0 + FIRST_BAN_S) == frozenset()
    assert bans.failed("a", 120.0).until("a") == 120.0 + 2 * FIRST_BAN_S


def test_many_sessions_that_one_incident_ends_count_once() -> None:
    bans = BanList().failed("a", 0.0)
    for session in range(32):
        bans = bans.failed("a", session / 10)
    assert bans.until("a") == FIRST_BAN_S


def test_an_answer_or_a_long_quiet_forgives() -> None:
    bans = BanList().failed("a", 0.0).failed("b", 0.0)
    assert bans.answered("a", 1.0).until("a") is None
    assert bans.answered("a", 1.0).banned(1.0) == {"b"}
    late = FIRST_BAN_S + FORGET_S
    assert bans.failed("a", late).until("a") == late + FIRST_BAN_S
    assert bans.failed("a", late).until("b") is None


def test_nothing_is_changed_in_place() -> None:
    before = BanList().failed("a", 0.0)
    before.failed("b", 0.0)
    before.answered("a", 0.0)
    assert before.banned(1.0) == {"a"}
    assert before.answered("unknown", 0.0) is before
