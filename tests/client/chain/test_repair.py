"""The plan of a repair: who stays, who comes, whose link is new, and who sends the trunk to whom."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.spans import Span
from treeswarm_client.chain.member import CLIENT
from treeswarm_client.chain.repair import MemberState, PlannedNode, RepairPlan, plan_repair
from treeswarm_client.discovery.route import Hop

BLOCKS = 8


def hop(name: str, start: int, end: int) -> Hop:
    return Hop(name, f"{name}:1", Span(start, end))


HEAD, MIDDLE, TAIL = hop("head", 0, 3), hop("middle", 3, 5), hop("tail", 5, 8)


class FakeRouter:
    """Serves each gap by given hops, and records what it was asked."""

    def __init__(self, *routes: Sequence[Hop]) -> None:
        self.routes = {Span(route[0].span.start, route[-1].span.end): list(route) for route in routes}
        self.requests: list[tuple[Span, str | None, str | None, frozenset[str]]] = []

    def __call__(self, gap: Span, before: str | None, after: str | None, avoid: Collection[str]) -> list[Hop]:
        self.requests.append((gap, before, after, frozenset(avoid)))
        hops = self.routes.get(gap, [])
        if not hops or any(hop.node in avoid for hop in hops):
            raise MissingBlocks(f"no nodes serve blocks {gap}")
        return hops


def working_chain(*hops: Hop) -> list[MemberState]:
    """Members that have the trunk, each linked to the one before it."""
    upstreams = [CLIENT, *hops[:-1]]
    return [MemberState(hop, proven=True, upstream=upstream) for hop, upstream in zip(hops, upstreams, strict=True)]


def lost(*hops: Hop) -> set[str]:
    return {hop.address for hop in hops}


def kept(hop: Hop, *, new_link: bool = False, sends_trunk: bool = False) -> PlannedNode:
    return PlannedNode(hop, False, new_link, sends_trunk)


def opened(hop: Hop, *, sends_trunk: bool = False) -> PlannedNode:
    return PlannedNode(hop, True, True, sends_trunk)


def test_opening_a_chain_is_the_repair_of_an_empty_one() -> None:
    router = FakeRouter([HEAD, MIDDLE, TAIL])
    plan = plan_repair([], (), BLOCKS, router)
    assert plan == RepairPlan((opened(HEAD, sends_trunk=True), opened(MIDDLE, sends_trunk=True), opened(TAIL)), ())
    assert router.requests == [(Span(0, 8), None, None, frozenset())]


def test_a_whole_chain_keeps_all_nodes_and_links() -> None:
    plan = plan_repair(working_chain(HEAD, MIDDLE, TAIL), (), BLOCKS, FakeRouter())
    assert plan == RepairPlan((kept(HEAD), kept(MIDDLE), kept(TAIL)), ())


def test_a_lost_head_is_replaced_and_fed_by_the_client() -> None:
    new = hop("new", 0, 3)
    router = FakeRouter([new])
    plan = plan_repair(working_chain(HEAD, MIDDLE, TAIL), lost(HEAD), BLOCKS, router)
    assert plan.nodes == (opened(new), kept(MIDDLE, new_link=True), kept(TAIL))
    assert plan.head.new
    assert plan.closed == (HEAD,)
    assert router.requests == [(Span(0, 3), None, "middle", frozenset({"head", "middle", "tail"}))]


def test_a_lost_middle_is_fed_from_the_heads_replay_log() -> None:
    new = hop("new", 3, 5)
    router = FakeRouter([new])
    plan = plan_repair(working_chain(HEAD, MIDDLE, TAIL), lost(MIDDLE), BLOCKS, router)
    assert plan.nodes == (kept(HEAD, sends_trunk=True), opened(new), kept(TAIL, new_link=True))
    assert not plan.head.new_link
    assert plan.closed == (MIDDLE,)
    assert router.requests[0][1:3] == ("head", "tail")


def test_a_lost_tail_is_fed_from_the_middles_replay_log() -> None:
    new = hop("new", 5, 8)
    router = FakeRouter([new])
    plan = plan_repair(working_chain(HEAD, MIDDLE, TAIL), lost(TAIL), BLOCKS, router)
    assert plan.nodes == (kept(HEAD), kept(MIDDLE, sends_trunk=True), opened(new))
    assert router.requests[0][1:3] == ("middle", None)


def test_several_nodes_fill_a_gap_and_forward_the_trunk() -> None:
    first, second = hop("first", 3, 4), hop("second", 4, 5)
    plan = plan_repair(working_chain(HEAD, MIDDLE, TAIL), lost(MIDDLE), BLOCKS, FakeRouter([first, second]))
    assert plan.nodes == (
        kept(HEAD, sends_trunk=True),
        opened(first, sends_trunk=True),
        opened(second),
        kept(TAIL, new_link=True),
    )


def test_two_gaps_are_filled_by_different_nodes() -> None:
    first, second = hop("first", 0, 3), hop("second", 5, 8)
    router = FakeRouter([first], [second])
    plan = plan_repair(working_chain(HEAD, MIDDLE, TAIL), lost(HEAD, TAIL), BLOCKS, router)
    assert plan.nodes == (opened(first), kept(MIDDLE, new_link=True, sends_trunk=True), opened(second))
    assert [gap for gap, *_ in router.requests] == [Span(5, 8), Span(0, 3)]
    assert "second" in router.requests[1][3]


def test_a_survivor_without_replay_log_is_replaced_too() -> None:
    """It refuses to resume, so the next attempt counts it as lost: one gap spans both nodes."""
    first, second = hop("first", 0, 3), hop("second", 3, 5)
    router = FakeRouter([first, second])
    plan = plan_repair(working_chain(HEAD, MIDDLE, TAIL), lost(MIDDLE, HEAD), BLOCKS, router)
    assert plan.nodes == (opened(first, sends_trunk=True), opened(second), kept(TAIL, new_link=True))
    assert plan.closed == (HEAD, MIDDLE)
    assert router.requests[0][:3] == (Span(0, 5), None, "tail")


def test_a_second_death_leaves_only_nodes_with_the_trunk() -> None:
    """The first attempt began an epoch with new nodes; one of them died before an answer came."""
    first, second, third = hop("first", 3, 4), hop("second", 4, 5), hop("third", 3, 5)
    members = [
        *working_chain(HEAD),
        MemberState(first, proven=False, upstream=HEAD),
        MemberState(second, proven=False, upstream=first),
        MemberState(TAIL, proven=True, upstream=second),
    ]
    router = FakeRouter([third])
    plan = plan_repair(members, lost(second), BLOCKS, router)
    assert plan.nodes == (kept(HEAD, sends_trunk=True), opened(third), kept(TAIL, new_link=True))
    assert plan.closed == (first, second)
    assert router.requests[0][3] == {"head", "tail", "second"}


def test_an_unproven_node_chosen_again_gets_a_new_link() -> None:
    members = [*working_chain(HEAD, MIDDLE), MemberState(TAIL, proven=False, upstream=MIDDLE)]
    plan = plan_repair(members, (), BLOCKS, FakeRouter([TAIL]))
    assert plan.nodes == (kept(HEAD), kept(MIDDLE, sends_trunk=True), opened(TAIL))
    assert (plan.closed, plan.reopened) == ((), (TAIL,))


def test_a_broken_link_between_survivors_is_renewed() -> None:
    members = working_chain(HEAD, MIDDLE, TAIL)
    members[1] = replace(members[1], upstream=None)
    plan = plan_repair(members, (), BLOCKS, FakeRouter())
    assert plan.nodes == (kept(HEAD), kept(MIDDLE, new_link=True), kept(TAIL))


@pytest.mark.parametrize("replaceable", [True, False])
def test_a_leaving_node_leaves_only_if_it_can_be_replaced(replaceable: bool) -> None:
    new = hop("new", 3, 5)
    members = working_chain(HEAD, MIDDLE, TAIL)
    members[1] = replace(members[1], leaving=True)
    plan = plan_repair(members, (), BLOCKS, FakeRouter([new]) if replaceable else FakeRouter())
    assert (plan.nodes[1].hop, plan.closed) == ((new, (MIDDLE,)) if replaceable else (MIDDLE, ()))


@pytest.mark.parametrize(
    ("place", "wider", "nodes"),
    [
        (1, hop("tail", 3, 8), (kept(HEAD, sends_trunk=True), opened(hop("tail", 3, 8)))),
        (1, hop("head", 0, 5), (opened(hop("head", 0, 5)), kept(TAIL, new_link=True))),
        (2, hop("middle", 3, 8), (kept(HEAD, sends_trunk=True), opened(hop("middle", 3, 8)))),
        (0, hop("middle", 0, 5), (opened(hop("middle", 0, 5)), kept(TAIL, new_link=True))),
    ],
)
def test_a_neighbour_that_alone_can_fill_the_gap_is_opened_again(
    place: int, wider: Hop, nodes: tuple[PlannedNode, ...]
) -> None:
    chain = (HEAD, MIDDLE, TAIL)
    plan = plan_repair(working_chain(*chain), lost(chain[place]), BLOCKS, FakeRouter([wider]))
    assert plan.nodes == nodes
    assert plan.closed == (chain[place],)
    assert [again.node for again in plan.reopened] == [wider.node]


def test_a_node_between_two_visits_of_another_one_is_left_out() -> None:
    wide = hop("head", 0, 8)
    plan = plan_repair(working_chain(HEAD, MIDDLE, TAIL), lost(TAIL), BLOCKS, FakeRouter([wide]))
    assert plan == RepairPlan((opened(wide),), (MIDDLE, TAIL), (HEAD,))


def test_both_neighbours_of_a_gap_are_opened_again_if_that_helps() -> None:
    first, second, third = hop("tail", 2, 6), hop("other", 6, 7), hop("last", 7, 8)
    chain = (hop("start", 0, 2), hop("before", 2, 3), MIDDLE, hop("tail", 5, 7), third)
    plan = plan_repair(working_chain(*chain), lost(MIDDLE), BLOCKS, FakeRouter([first, second]))
    assert plan.nodes == (
        kept(chain[0], sends_trunk=True),
        opened(first, sends_trunk=True),
        opened(second),
        kept(third, new_link=True),
    )
    assert (plan.closed, plan.reopened) == ((chain[1], MIDDLE), (chain[3],))


def test_a_leaving_node_leaves_if_its_neighbour_can_serve_its_blocks() -> None:
    members = working_chain(HEAD, MIDDLE, TAIL)
    members[1] = replace(members[1], leaving=True)
    plan = plan_repair(members, (), BLOCKS, FakeRouter([hop("tail", 3, 8)]))
    assert (plan.closed, plan.reopened) == ((MIDDLE,), (TAIL,))


def test_blocks_without_nodes_raise_the_routers_error() -> None:
    router = FakeRouter()
    with pytest.raises(MissingBlocks, match="3:5"):
        plan_repair(working_chain(HEAD, MIDDLE, TAIL), lost(MIDDLE), BLOCKS, router)
    assert [gap for gap, *_ in router.requests] == [Span(3, 5), Span(3, 8), Span(0, 5), Span(0, 8)]
