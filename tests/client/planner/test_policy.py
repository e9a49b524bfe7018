"""What the automatic policy drafts and ships, by what links and nodes cost."""

import numpy as np
import pytest

from treeswarm.protocol.messages import HopTiming
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.loss_budget import EXPLORE_NODES
from treeswarm_client.planner.policy import AutoPolicy, PlannerMemory, Round

TREE = DraftTree(np.arange(-1, 15), np.arange(16), np.log(0.9) * np.arange(1, 17).astype(np.float32))
COMPUTE_US = 5_000


def after_rounds(
    latency_s: float, *, overlaps: bool = True, is_local: bool = False, queue_us: int = 0, sessions: int = 1
) -> AutoPolicy:
    """Return a policy that has learned from some rounds whose trees were always right."""
    policy = AutoPolicy(PlannerMemory(), 1024, 1024, overlaps=overlaps)
    policy.begin([ChainHop("a", is_local=is_local), ChainHop("b")])
    timing = (HopTiming(0, COMPUTE_US, 17, 1), HopTiming(queue_us, COMPUTE_US, 17, sessions))
    seconds = latency_s + (2 * COMPUTE_US + queue_us) / 1e6
    policy.learn_prefill(seconds, [timing], unbroken=True)
    for _ in range(12):
        if policy.nodes_to_draft():
            policy.stop_drafting()
        shipped = policy.choose(TREE)
        walk = Walk(tuple(range(len(shipped))), 99)
        policy.learn(Round(shipped, walk, len(shipped), len(shipped), seconds, seconds, [timing], unbroken=True))
    return policy


@pytest.mark.parametrize(
    ("latency_s", "overlaps", "is_local", "ahead"),
    [
        (0.2, True, False, True),
        (0.002, True, False, True),
        (0.2, False, False, False),
        (0.2, True, True, True),
        (0.002, True, True, False),
    ],
)
def test_drafting_continues_in_flight_where_it_takes_no_node_cores(
    latency_s: float, overlaps: bool, is_local: bool, ahead: bool
) -> None:
    policy = after_rounds(latency_s, overlaps=overlaps, is_local=is_local)
    assert (policy.nodes_to_draft_in_flight() > 16) == ahead


def test_a_plain_round_drafts_a_few_nodes_in_flight_and_needs_no_tries() -> None:
    policy = AutoPolicy(PlannerMemory(), 1024, 1024)
    policy.begin([ChainHop("a", ((1, 5_000), (16, 50_000)))])
    tried, behind = [], []
    for _ in range(240):
        tried.append(policy.nodes_to_draft())
        shipped = policy.choose(NO_TREE)
        behind.append(policy.nodes_to_draft_in_flight())
        tree = TREE.best(behind[-1])
        policy.record_draft(tree, 0.02)
        shipped = policy.extension(shipped, tree, 0.02)
        hop = HopTiming(0, 5_000, 1, 1)
        policy.learn(Round(shipped, Walk((), 99), 0, 0, 0.205, 0.205, [(hop,)], unbroken=True))
    assert behind[0] > EXPLORE_NODES
    assert sum(map(bool, tried[120:])) < 30
    plain = [nodes for nodes, asked in zip(behind[120:], tried[120:], strict=True) if not asked]
    assert set(plain) == {EXPLORE_NODES}  # they tell what drafting takes, and whether guesses would hit


def test_extensions_shrink_the_longer_a_tree_is_in_flight() -> None:
    policy = after_rounds(0.2)
    policy.stop_drafting()
    shipped = policy.choose(TREE.best(2))
    sent = [len(policy.extension(shipped, TREE, elapsed_s)) for elapsed_s in (0.0, 0.15, 2.0)]
    assert sent[0] >= sent[1] >= sent[2] == len(shipped)
    assert sent[0] > len(shipped)


@pytest.mark.parametrize(
    ("queue_us", "sessions", "follows"),
    [(0, 1, True), (COMPUTE_US // 10, 1, True), (COMPUTE_US, 1, False), (0, 2, False)],
    ids=["idle", "seldom waiting", "rows wait", "shared forwards"],
)
def test_nothing_follows_a_tree_where_other_sessions_wait(queue_us: int, sessions: int, follows: bool) -> None:
    """A further forward costs the others its fixed part too: at busy nodes a tree travels as one append."""
    policy = after_rounds(0.2, queue_us=queue_us, sessions=sessions)
    policy.stop_drafting()
    shipped = policy.choose(TREE.best(2))
    assert (len(policy.extension(shipped, TREE, 0.0)) > len(shipped)) == follows
    assert policy.nodes_to_draft_in_flight() > len(shipped), "drafting in flight costs the nodes nothing"


def test_drafting_ends_when_it_promises_less_than_its_time() -> None:
    policy = after_rounds(0.2)
    must_stop = policy.stop_drafting()
    worth = 1.0 / policy.costs.plain_s
    assert not must_stop(1000 * worth)
    assert must_stop(worth)


def test_drafting_ends_after_a_share_of_a_round() -> None:
    now = 0.0
    policy = after_rounds(0.2)
    policy.clock = lambda: now
    must_stop = policy.stop_drafting()
    assert not must_stop(1e6)
    now = policy.costs.plain_s
    assert must_stop(1e6)
