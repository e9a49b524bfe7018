"""A hole is filled within seconds, by one node, on a virtual clock; a living node is not replaced."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.support.healing_swarm import BLOCKS, LAG_S, LOAD_S, HealingSwarm

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm.topology.healing import JOINING_TRUST_S
from treeswarm.topology.span_limits import SpanLimits
from treeswarm.transport.lost_report import report_lost
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.membership.hole_watch import TOLD_EACH

# Seconds beyond loading: the aim, and the most (docs/decisions/047).
SOON_S, MOST_S = 15.0, 30.0


def in_swarm(scenario: Callable[[HealingSwarm], Awaitable[None]], lag_s: float = LAG_S) -> None:
    async def run() -> None:
        swarm = HealingSwarm(lag_s=lag_s)
        try:
            await scenario(swarm)
        finally:
            await swarm.stop()

    run_virtually(run())


@pytest.mark.parametrize("spares", [1, 2, 5])
def test_a_spare_takes_over_from_a_killed_only_holder(spares: int) -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, *others = await swarm.start((0, 4), *[(4, 8)] * (1 + spares))
        await asyncio.sleep(30)
        assert sum(node.claims for node in swarm.nodes) == 0
        await holder.kill()
        assert await swarm.heal_s(holder) < SOON_S
        await asyncio.sleep(120)
        assert sum(node.moves for node in others) == 1, "no other spare jumps after the first"
        assert sum(node.claims for node in others) == 1
        assert swarm.covered(holder)

    in_swarm(scenario)


def test_a_hole_at_the_head_is_filled_by_as_many_blocks_as_fit_there() -> None:
    limits = SpanLimits(4, 2, 4, whole=False)

    async def scenario(swarm: HealingSwarm) -> None:
        holder, *others = await swarm.start((0, 4), *[(4, 8)] * 4, limits=limits)
        await asyncio.sleep(30)
        await holder.kill()
        assert await swarm.heal_s(holder) < 2 * MOST_S + LOAD_S
        await asyncio.sleep(120)
        assert swarm.covered(holder)
        assert all(limits.allow(node.span, BLOCKS) for node in others)
        assert Span(0, 2) in [node.span for node in others]

    in_swarm(scenario)


def test_a_node_that_cannot_hold_the_head_leaves_it_to_others() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        (holder,) = await swarm.start((0, 4))
        small = await swarm.start(*[(4, 8)] * 3, limits=SpanLimits(4, 0, 4, whole=False))
        (able,) = await swarm.start((4, 8))
        await asyncio.sleep(30)
        await holder.kill()
        await swarm.heal_s(holder)
        await asyncio.sleep(120)
        assert swarm.covered(holder)
        assert able.span.start == 0
        assert all(node.span.start > 0 for node in small)

    in_swarm(scenario)


def test_nodes_of_fixed_blocks_let_others_fill_the_hole() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        (holder,) = await swarm.start((0, 4))
        await swarm.start(*[(4, 8)] * 3, may_move=False)
        (spare,) = await swarm.start((4, 8))
        await asyncio.sleep(20)
        await holder.kill()
        assert await swarm.heal_s(holder) < MOST_S + LAG_S
        assert spare.span == Span(0, 4)

    in_swarm(scenario)


@pytest.mark.parametrize(("nodes", "warnings"), [(1, 0), (2, 2)])
def test_only_a_node_that_knows_others_warns_of_a_hole(
    nodes: int, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a registry, a node cannot know what others serve."""

    async def scenario(swarm: HealingSwarm) -> None:
        await swarm.start(*[(0, 4)] * nodes)
        await asyncio.sleep(60)

    in_swarm(scenario)
    assert caplog.text.count("no living node serves blocks 4:8") == warnings


def test_a_node_whose_blocks_would_be_missing_stays() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, second, third = await swarm.start((0, 4), (4, 6), (6, 8))
        await asyncio.sleep(20)
        await holder.kill()
        await asyncio.sleep(120)
        assert (second.span, third.span) == (Span(4, 6), Span(6, 8))

    in_swarm(scenario)


def test_holders_that_die_together_leave_a_hole_that_is_filled() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holders = await swarm.start(*[(0, 4)] * 6)
        others = await swarm.start(*[(4, 8)] * 5)
        await asyncio.sleep(10)
        for holder in holders:
            await holder.kill()
        # None of them was watched: the first death is found by a report, or by the distance survey.
        others[3].monitor.note_silence(holders[2].key.id)
        swarm.nodes = others
        assert await swarm.heal_s(holders[0]) < MOST_S
        await asyncio.sleep(60)
        assert sum(node.moves for node in others) == 1

    in_swarm(scenario)


def test_a_false_report_makes_a_living_node_answer_one_ping() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, other, spare = await swarm.start((0, 4), (4, 8), (4, 8))
        await asyncio.sleep(30)
        before = holder.pings
        for _ in range(20):
            await report_lost(other.transport, spare.listener.address, [holder.key.id, "0" * 32])
            await asyncio.sleep(1.0)
        assert spare.monitor.liveness.dead == frozenset()
        assert holder.pings - before < 20, "no more pings than by watching"
        assert sum(node.claims for node in swarm.nodes) == 0

    in_swarm(scenario)


@pytest.mark.parametrize("late_s", [3.0, 6.0])
def test_a_holder_that_answers_late_is_not_replaced(late_s: float) -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, *_ = await swarm.start((0, 4), (4, 8), (4, 8))
        await asyncio.sleep(20)
        swarm.late_s[holder.listener.address] = late_s
        await asyncio.sleep(120)
        assert sum(node.claims for node in swarm.nodes) == 0

    in_swarm(scenario)


def test_a_holder_that_comes_back_in_time_keeps_its_blocks() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, *others = await swarm.start((0, 4), (4, 8), (4, 8))
        await asyncio.sleep(20)
        swarm.network.freeze(holder.listener.address)
        while not any(node.claims for node in others):
            await asyncio.sleep(0.1)
        await swarm.network.thaw(holder.listener.address)
        await asyncio.sleep(120)
        assert sum(node.moves for node in others) == 0
        assert [node.span for node in others] == [Span(4, 8)] * 2

    in_swarm(scenario)


def test_a_node_cut_off_from_all_others_claims_nothing() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, other, spare = await swarm.start((0, 4), (4, 8), (4, 8))
        await asyncio.sleep(20)
        for node in (holder, other):
            swarm.network.partitions.add(frozenset({spare.listener.address, node.listener.address}))
        await asyncio.sleep(120)
        assert spare.monitor.liveness.silences
        assert sum(node.claims for node in swarm.nodes) == 0

    in_swarm(scenario)


@pytest.mark.parametrize("spares", [1, 4])
def test_claims_are_settled_by_asking_however_late_records_are(spares: int) -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, *others = await swarm.start((0, 4), *[(4, 8)] * (1 + spares))
        await asyncio.sleep(10)
        await holder.kill()
        assert await swarm.heal_s(holder) < SOON_S
        await asyncio.sleep(90)
        assert sum(node.moves for node in others) == 1

    in_swarm(scenario, lag_s=60.0)


def test_many_dark_holders_are_replaced_in_time() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holders = await swarm.start(*[(0, 4)] * 20)
        others = await swarm.start(*[(4, 8)] * 4)
        await asyncio.sleep(10)
        for holder in holders:
            await holder.tasks.close()
            swarm.network.freeze(holder.listener.address)
        others[0].monitor.note_silence(holders[0].key.id)
        swarm.nodes = others
        assert await swarm.heal_s(holders[0]) < MOST_S
        await asyncio.sleep(120)
        assert sum(node.moves for node in others) == 1
        swarm.nodes = holders + others

    in_swarm(scenario)


def test_a_node_that_joins_for_too_long_does_not_keep_the_hole_open() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, *others = await swarm.start((0, 4), *[(4, 8)] * 3)
        for node in others:
            node.load_s = 10_000.0
        await asyncio.sleep(20)
        await holder.kill()
        while not any(node.moves for node in others):
            await asyncio.sleep(0.1)
        for node in others:
            node.load_s = 10.0
        assert await swarm.heal_s(holder) < JOINING_TRUST_S + MOST_S
        assert sorted(node.state for node in others) == [NodeState.JOINING, NodeState.ONLINE, NodeState.ONLINE]

    in_swarm(scenario)


def test_nodes_of_another_numerics_class_hold_no_block_of_this_one() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        holder, *others = await swarm.start((0, 4), (4, 8), (4, 8))
        await swarm.start((0, 8), numerics=NumericsClass("01" * 32, "bfloat16"))
        await asyncio.sleep(20)
        await holder.kill()
        while not any(node.moves for node in others):
            await asyncio.sleep(1)
            assert asyncio.get_running_loop().time() < 120
        await asyncio.sleep(60)
        assert sorted(node.span for node in others) == [Span(0, 4), Span(4, 8)]

    in_swarm(scenario)


def test_an_unfillable_hole_is_reported_a_bounded_number_of_times() -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        (holder,) = await swarm.start((0, 4))
        others = await swarm.start(*[(4, 8)] * 5, may_move=False)
        await asyncio.sleep(20)
        await holder.kill()
        await asyncio.sleep(100)
        assert 0 < sum(node.reports for node in others) <= 5 * 4 * TOLD_EACH

    in_swarm(scenario)


def test_a_swarm_that_becomes_private_tells_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(swarm: HealingSwarm) -> None:
        keyless, *others = await swarm.start((0, 4), (4, 8), (4, 8))
        await asyncio.sleep(20)
        assert "swarm key" not in caplog.text
        swarm.keyless.add(keyless.listener.address)
        assert await swarm.heal_s(keyless) < SOON_S, "its blocks count no more"
        await asyncio.sleep(300)
        assert sum(node.moves for node in others) == 1

    in_swarm(scenario)
    told = [record.message for record in caplog.records if record.levelname in ("ERROR", "WARNING")]
    # Nobody answers the node without the key; the others hear each other.
    assert any(text.startswith("blocks 0:4 of the node at 127.0.0.1:") and "private" in text for text in told)
