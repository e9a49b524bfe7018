"""The planner's pace: what it asks for and ships, by what links and nodes cost."""

import numpy as np
import pytest

from treeswarm.messages import HopTiming
from treeswarm.walk import Walk
from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.pace import ChainHop, Round
from treeswarm_client.planner.auto import AutoPace
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
    assert (pace.ahead(16) > 16) == ahead


def test_nothing_is_sent_after_a_tree_that_is_nearly_back() -> None:
    pace = after_rounds(0.2)
    pace.patience()
    shipped = pace.choose(DraftTree(TREE.parents[:2], TREE.tokens[:2], TREE.scores[:2]))
    assert len(pace.further(shipped, TREE, 0.15)) == len(shipped)
    assert len(pace.further(shipped, TREE, 0.0)) > len(shipped)
