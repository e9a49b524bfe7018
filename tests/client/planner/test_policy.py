"""The planner's policy: what it asks for and ships, by what links and nodes cost."""

import numpy as np
import pytest

from treeswarm.protocol.messages import HopTiming
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.planner import Planner
from treeswarm_client.planner.policy import AutoPolicy, Round

TREE = DraftTree(np.arange(-1, 15), np.arange(16), np.log(0.9) * np.arange(1, 17).astype(np.float32))
COMPUTE_US = 5_000


def after_rounds(latency_s: float, *, overlaps: bool = True) -> AutoPolicy:
    """A policy that has seen some rounds of chains that were always right."""
    policy = AutoPolicy(Planner(), 1024, 1024, overlaps=overlaps)
    policy.begin([ChainHop("a"), ChainHop("b")])
    timing = (HopTiming(0, COMPUTE_US, 17, 1), HopTiming(0, COMPUTE_US, 17, 1))
    seconds = latency_s + 2 * COMPUTE_US / 1e6
    policy.learn_prefill(seconds, [timing], whole=True)
    for _ in range(12):
        if policy.nodes_to_draft():
            policy.stop_drafting()
        shipped = policy.choose(TREE)
        found = Walk(tuple(range(len(shipped))), 99)
        policy.learn(Round(shipped, found, len(shipped), len(shipped), seconds, seconds, [timing], whole=True))
    return policy


@pytest.mark.parametrize(
    ("latency_s", "overlaps", "ahead"), [(0.2, True, True), (0.002, True, False), (0.2, False, False)]
)
def test_drafting_goes_on_while_a_tree_travels_where_links_leave_time(
    latency_s: float, overlaps: bool, ahead: bool
) -> None:
    policy = after_rounds(latency_s, overlaps=overlaps)
    assert (policy.nodes_to_draft_in_flight() > 16) == ahead


def test_what_a_plain_text_is_tried_with_is_drafted_behind_the_round_before() -> None:
    policy = AutoPolicy(Planner(), 1024, 1024)
    policy.begin([ChainHop("a", ((1, 5_000), (16, 50_000)))])
    tried, behind = [], []
    for _ in range(240):
        wanted = policy.nodes_to_draft()
        if wanted:
            policy.stop_drafting()
        shipped = policy.choose(TREE if wanted else NO_TREE)
        behind.append(policy.nodes_to_draft_in_flight())
        tried.append(wanted)
        hop = HopTiming(0, 2_000 + 3_000 * (1 + len(shipped)), 1 + len(shipped), 1)
        took = 0.2 + hop.compute_us / 1e6
        policy.learn(Round(shipped, Walk((), 99), len(shipped), len(shipped), took, took, [(hop,)], whole=True))
    tries = [i for i in range(120, 240) if tried[i]]
    assert 0 < len(tries) < 30
    assert all(behind[i - 1] for i in tries)
    assert sum(made > 0 for made in behind[119:239]) < 60


def test_less_is_sent_after_a_tree_the_longer_it_is_under_way() -> None:
    policy = after_rounds(0.2)
    policy.stop_drafting()
    shipped = policy.choose(DraftTree(TREE.parents[:2], TREE.tokens[:2], TREE.scores[:2]))
    sent = [len(policy.extension(shipped, TREE, elapsed_s)) for elapsed_s in (0.0, 0.15, 2.0)]
    assert sent[0] >= sent[1] >= sent[2] == len(shipped)
    assert sent[0] > len(shipped)


def test_drafting_is_waited_for_as_long_as_it_promises_more_than_its_time_is_worth() -> None:
    policy = after_rounds(0.2)
    ends = policy.stop_drafting()
    worth = 1.0 / policy.planner.costs.plain_s
    assert not ends(1000 * worth)
    assert ends(worth)


def test_no_promise_is_waited_for_longer_than_a_share_of_a_round() -> None:
    now = 0.0
    policy = after_rounds(0.2)
    policy.clock = lambda: now
    ends = policy.stop_drafting()
    assert not ends(1e6)
    now = policy.planner.costs.plain_s
    assert ends(1e6)
