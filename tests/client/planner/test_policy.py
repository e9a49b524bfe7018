"""The planner's pace: what it asks for and ships, by what links and nodes cost."""

import numpy as np
import pytest

from treeswarm.protocol.messages import HopTiming
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.planner.auto import AutoPace
from treeswarm_client.planner.pace import ChainHop, Round
from treeswarm_client.planner.planner import Planner

TREE = DraftTree(np.arange(-1, 15), np.arange(16), np.log(0.9) * np.arange(1, 17).astype(np.float32))
COMPUTE_US = 5_000


def after_rounds(latency_s: float, *, overlaps: bool = True) -> AutoPace:
    """A pace that has seen some rounds of chains that were always right."""
    pace = AutoPace(Planner(), 1024, 1024, overlaps=overlaps)
    pace.begin([ChainHop("a"), ChainHop("b")])
    timing = (HopTiming(0, COMPUTE_US, 17, 1), HopTiming(0, COMPUTE_US, 17, 1))
    seconds = latency_s + 2 * COMPUTE_US / 1e6
    pace.prefilled(seconds, [timing], whole=True)
    for _ in range(12):
        if pace.wanted():
            pace.patience()
        shipped = pace.choose(TREE)
        found = Walk(tuple(range(len(shipped))), 99)
        pace.learn(Round(shipped, found, len(shipped), len(shipped), seconds, seconds, [timing], whole=True))
    return pace


@pytest.mark.parametrize(
    ("latency_s", "overlaps", "ahead"), [(0.2, True, True), (0.002, True, False), (0.2, False, False)]
)
def test_drafting_goes_on_while_a_tree_travels_where_links_leave_time(
    latency_s: float, overlaps: bool, ahead: bool
) -> None:
    pace = after_rounds(latency_s, overlaps=overlaps)
    assert (pace.ahead() > 16) == ahead


def test_what_a_plain_text_is_tried_with_is_drafted_behind_the_round_before() -> None:
    pace = AutoPace(Planner(), 1024, 1024)
    pace.begin([ChainHop("a", ((1, 5_000), (16, 50_000)))])
    tried, behind = [], []
    for _ in range(240):
        wanted = pace.wanted()
        if wanted:
            pace.patience()
        shipped = pace.choose(TREE if wanted else NO_TREE)
        behind.append(pace.ahead())
        tried.append(wanted)
        hop = HopTiming(0, 2_000 + 3_000 * (1 + len(shipped)), 1 + len(shipped), 1)
        took = 0.2 + hop.compute_us / 1e6
        pace.learn(Round(shipped, Walk((), 99), len(shipped), len(shipped), took, took, [(hop,)], whole=True))
    tries = [i for i in range(120, 240) if tried[i]]
    assert 0 < len(tries) < 30
    assert all(behind[i - 1] for i in tries)
    assert sum(made > 0 for made in behind[119:239]) < 60


def test_less_is_sent_after_a_tree_the_longer_it_is_under_way() -> None:
    pace = after_rounds(0.2)
    pace.patience()
    shipped = pace.choose(DraftTree(TREE.parents[:2], TREE.tokens[:2], TREE.scores[:2]))
    sent = [len(pace.further(shipped, TREE, elapsed_s)) for elapsed_s in (0.0, 0.15, 2.0)]
    assert sent[0] >= sent[1] >= sent[2] == len(shipped)
    assert sent[0] > len(shipped)


def test_drafting_is_waited_for_as_long_as_it_promises_more_than_its_time_is_worth() -> None:
    pace = after_rounds(0.2)
    ends = pace.patience()
    worth = 1.0 / pace.planner.costs.plain_s
    assert not ends(1000 * worth)
    assert ends(worth)


def test_no_promise_is_waited_for_longer_than_a_share_of_a_round() -> None:
    now = 0.0
    pace = after_rounds(0.2)
    pace.clock = lambda: now
    ends = pace.patience()
    assert not ends(1e6)
    now = pace.planner.costs.plain_s
    assert ends(1e6)
