"""The choice of a numerics class and of routes, and the errors if there are none."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.registry_media import OTHER_MODEL

from treeswarm.errors import Mismatch, MissingBlocks, NodeLost, Refused, RouteError
from treeswarm.model_files import ModelShape, read_shape, resolve_model
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeState, SealedRecord
from treeswarm.protocol.spans import Span
from treeswarm.protocol.text_rules import Grammar, TextRules
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.topology.bans import FIRST_RETRY_S, BanList
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.discovery.gap import explain_gap
from treeswarm_client.discovery.route import ANY_TAIL, TailNeeds, Target, needs_of
from treeswarm_client.discovery.swarm_view import SwarmView
from treeswarm_client.discovery.target import choose_target

ONE, TWO = NumericsClass("01" * 32, "float32"), NumericsClass("02" * 32, "float32")
HALF = NumericsClass("01" * 32, "bfloat16")
TARGET = Target(ONE, 8, 100, 16, 512)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    """Eight blocks."""
    return read_shape(Path(resolve_model("demo")))


def record(start: int, end: int, *, port: int = 4001, numerics: NumericsClass = ONE, **changes: Any) -> SealedRecord:
    return FakeNode().record(port, **{"span": Span(start, end), "numerics": numerics, "coordinate": (), **changes})


# ---------------------------------------------------------------- which model


def test_the_only_whole_class_is_chosen(shape: ModelShape) -> None:
    target = choose_target((record(0, 5), record(5, 8)), MODEL, shape)
    assert target == Target(ONE, 8, shape.vocab_size, shape.hidden_size, shape.max_positions)


def test_the_whole_class_with_most_nodes_is_chosen(shape: ModelShape) -> None:
    many = (record(0, 8), record(0, 8, numerics=TWO), record(0, 4, numerics=TWO))
    assert choose_target(many, MODEL, shape).numerics == TWO
    assert choose_target(many[::-1], MODEL, shape).numerics == TWO


def test_a_class_with_gaps_is_not_chosen_despite_more_nodes(shape: ModelShape) -> None:
    snapshot = (record(0, 4), record(0, 4), record(0, 4), record(0, 8, numerics=HALF))
    assert choose_target(snapshot, MODEL, shape).numerics == HALF


@pytest.mark.parametrize("state", [NodeState.JOINING, NodeState.PAUSED, NodeState.GONE])
def test_nodes_that_do_not_serve_yet_form_no_class(shape: ModelShape, state: NodeState) -> None:
    """They may not know their weights yet, so a client must not choose what they announce."""
    unknown = NumericsClass("00" * 32, "float32")
    loading = [record(0, 8, numerics=unknown, state=state) for _ in range(3)]
    assert choose_target((*loading, record(0, 4), record(4, 8)), MODEL, shape).numerics == ONE
    with pytest.raises(MissingBlocks, match="4:8"):
        choose_target((*loading, record(0, 4)), MODEL, shape)
    with pytest.raises(MissingBlocks, match="no node serves blocks 0:8 of 8"):
        choose_target(tuple(loading), MODEL, shape)


def test_an_empty_swarm_is_a_route_error(shape: ModelShape) -> None:
    with pytest.raises(RouteError, match="no node announces itself"):
        choose_target((), MODEL, shape)


def test_nodes_of_another_model_are_a_mismatch(shape: ModelShape) -> None:
    with pytest.raises(Mismatch, match=rf"serves a model of another config \(demo, 8 blocks, digest {'cd' * 6}"):
        choose_target((record(0, 8, model=OTHER_MODEL),), MODEL, shape)


@pytest.mark.parametrize(
    ("other", "words"),
    [(TWO, "their weights differ"), (HALF, "float32 and bfloat16"), (NumericsClass("01" * 32, "float32", "q4"), "q4")],
    ids=["weights", "dtype", "quantization"],
)
def test_classes_that_are_whole_only_together_are_a_mismatch(
    shape: ModelShape, other: NumericsClass, words: str
) -> None:
    with pytest.raises(Mismatch, match=f"would compute different text: .*{words}"):
        choose_target((record(0, 4), record(4, 8, numerics=other)), MODEL, shape)


def test_missing_blocks_are_named(shape: ModelShape) -> None:
    with pytest.raises(
        MissingBlocks, match=r"no node serves blocks 2:4, 7:8 of 8 \(.*\): start `swarm-node MODEL --blocks 2:4"
    ):
        choose_target((record(0, 2), record(4, 7)), MODEL, shape)


def test_a_gap_names_who_serves_the_rest_and_who_had_it() -> None:
    records = [
        record(0, 2).record,
        record(4, 7, state=NodeState.PAUSED).record,
        record(2, 4, state=NodeState.JOINING).record,
        replace(record(7, 8).record, address="10.0.0.9:4001"),
    ]
    words = str(explain_gap(records, [Span(2, 8)], 8, ["10.0.0.9:4001#ab", "10.0.0.7:1"]))
    address = records[0].address
    assert words == (
        f"no node serves blocks 2:8 of 8 ({address} is loading 2:4, {address} is paused with 4:7, "
        f"10.0.0.9:4001 with 7:8 does not answer and 1 more; {address} serves 0:2): "
        "start `swarm-node MODEL --blocks 2:8`, or wait until a node moves there"
    )


# ---------------------------------------------------------------- which way


def view_of(*records: SealedRecord) -> SwarmView:
    return SwarmView(MemoryRegistry(MODEL), TARGET, 65, snapshot=records)


def virtually(test: Callable[[], None]) -> None:
    """Run a test inside a loop with a virtual clock, from which the view reads the time."""

    async def run() -> None:
        test()

    run_virtually(run())


def route(view: SwarmView, *, room: int = 100, avoid: tuple[str, ...] = ()) -> list[str]:
    hops = view.route(Span(0, 8), before=None, after=None, room=room, avoid=avoid)
    assert [hop.span.start for hop in hops] == [0, *(hop.span.end for hop in hops[:-1])]
    return [hop.node for hop in hops]


def test_a_typed_address_precedes_the_announced_one() -> None:
    def test() -> None:
        head, tail = record(0, 4), record(4, 8, port=4002)
        view = view_of(tail, head)
        view.dials = {head.record.node: "typed.example:9"}
        hops = view.route(Span(0, 8), before=None, after=None, room=100, avoid=())
        assert [(hop.node, hop.address) for hop in hops] == [
            (head.record.node, "typed.example:9"),
            (tail.record.node, f"127.0.0.1:4002#{'0f' * 16}"),
        ]

    virtually(test)


@pytest.mark.parametrize(
    "changes",
    [{"state": state} for state in NodeState if state is not NodeState.ONLINE] + [{"numerics": TWO}, {"blocks": 9}],
    ids=str,
)
def test_unusable_nodes_are_not_routed_to(changes: dict[str, Any]) -> None:
    def test() -> None:
        with pytest.raises(MissingBlocks, match="no node serves blocks 4:8"):
            route(view_of(record(0, 4), record(4, 8, **changes)))

    virtually(test)


RULED = TailNeeds(1)


def test_only_a_node_that_applies_the_rules_is_the_tail() -> None:
    """A node without rules still computes blocks before the last one."""

    def test() -> None:
        old, new = record(0, 8), record(6, 8, port=4002, rules=1)
        view = view_of(old, new)
        assert route(view) == [old.record.node]
        hops = view.route(Span(0, 8), before=None, after=None, room=100, avoid=(), needs=RULED)
        assert [(hop.node, hop.span.end) for hop in hops][-1] == (new.record.node, 8)
        assert hops[0].node == old.record.node
        assert view.has_spare(Span(6, 8), avoid={new.record.node})
        assert not view.has_spare(Span(6, 8), avoid={new.record.node}, needs=RULED)
        assert not view.nodes_to_leave(hops, room=100, trunk=1, rounds_left=1e9, needs=RULED)

    virtually(test)


def test_a_missing_tail_for_rules_is_named_as_that() -> None:
    def test() -> None:
        old = record(0, 8)
        with pytest.raises(MissingBlocks, match=r"applies the rules of this request: 127\.0\.0\.1:4001 would need"):
            view_of(old).route(Span(0, 8), before=None, after=None, room=100, avoid=(), needs=RULED)
        needs = TailNeeds(1, "llguidance 2")
        with pytest.raises(MissingBlocks, match="applies grammars with llguidance 2"):
            view_of(record(0, 8, rules=1, grammar="llguidance 1")).route(
                Span(0, 8), before=None, after=None, room=100, avoid=(), needs=needs
            )

    virtually(test)


def test_rules_and_grammars_need_tails_that_apply_them() -> None:
    grammar = TextRules(grammar=Grammar("json_object"))
    assert needs_of(TextRules(end_tokens=(1,)), "a") == ANY_TAIL
    assert needs_of(TextRules(min_p=0.5), "a") == TailNeeds(1)
    assert needs_of(grammar, "b") == TailNeeds(1, "b")
    assert not needs_of(grammar, "b").are_met_by(record(0, 8, rules=1).record)


def test_missing_blocks_come_with_their_nodes_last_errors() -> None:
    def test() -> None:
        head, tail = record(0, 4), record(4, 8)
        view = view_of(head, tail)
        view.report_failure(head.record.node, NodeLost("the head fell silent", "127.0.0.1:4001"))
        view.report_failure(tail.record.node, NodeLost("the tail fell silent", "127.0.0.1:4001"))
        with pytest.raises(
            MissingBlocks, match=r"failed lately .*\(lately: the (head|tail) fell silent; the"
        ) as missing:
            route(view)
        assert "0:8" in str(missing.value)
        with pytest.raises(MissingBlocks) as missing:
            view.route(Span(4, 8), before=None, after=None, room=100, avoid=())
        assert "the tail fell silent" in str(missing.value)
        assert "the head" not in str(missing.value)

    virtually(test)


def test_a_spare_node_is_one_that_has_not_failed_lately() -> None:
    def test() -> None:
        head, tail, other = record(0, 4), record(4, 8), record(2, 8, port=4002)
        view, avoid = view_of(head, tail, other), {tail.record.node}
        assert view.has_spare(Span(4, 8), avoid=avoid)
        assert not view.has_spare(Span(1, 8), avoid={head.record.node})
        view.report_failure(other.record.node, NodeLost("it fell silent", "127.0.0.1:4002"))
        assert not view.has_spare(Span(4, 8), avoid=avoid)

    virtually(test)


def test_a_node_announced_full_is_tried_if_there_is_no_other() -> None:
    """Otherwise a node that was full for a second would be avoided for a minute, until its next record."""

    def test() -> None:
        full, roomy = record(4, 8, free_tokens=50), record(4, 8)
        assert route(view_of(record(0, 4), full))[1] == full.record.node
        assert route(view_of(record(0, 4), full, roomy))[1] == roomy.record.node

    virtually(test)


def test_a_route_with_only_full_nodes_is_refused() -> None:
    def test() -> None:
        tail = record(4, 8)
        view = view_of(record(0, 4), tail)
        view.report_failure(tail.record.node, Refused("this node is full", "full"))
        with pytest.raises(
            Refused, match=r"every node that serves blocks 0:8 is full: wait with --patience"
        ) as refused:
            route(view)
        assert refused.value.code == "full"

    virtually(test)


def test_a_route_with_full_and_lost_nodes_is_missing() -> None:
    def test() -> None:
        head, tail = record(0, 4), record(4, 8, free_tokens=1)
        view = view_of(head, tail)
        view.report_failure(head.record.node, NodeLost("gone", ""))
        with pytest.raises(MissingBlocks, match="gone"):
            route(view)

    virtually(test)


def test_failed_nodes_are_avoided_longer_than_full_ones() -> None:
    first, second = record(0, 8), record(0, 8)
    names = {first.record.node, second.record.node}

    async def run() -> None:
        view = view_of(first, second)
        for error, least, most in ((NodeLost("gone", ""), 10, 16), (Refused("full", "full"), 1, 5)):
            view.report_failure(first.record.node, error)
            assert route(view) == [second.record.node]
            await asyncio.sleep(least)
            assert route(view) == [second.record.node]
            await asyncio.sleep(most - least)
            assert {route(view, avoid=(second.record.node,))[0]} == {first.record.node}
        view.report_failure(first.record.node, NodeLost("gone", ""))
        view.failures.bans = BanList()
        assert {route(view, avoid=(other,))[0] for other in names} == names
        for code in ("no-journal", "unknown-session", "expired"):
            view.report_failure(first.record.node, Refused("unknown session", code))
        assert {route(view, avoid=(other,))[0] for other in names} == names

    run_virtually(run())


def test_a_traversal_after_a_ban_clears_it_but_a_ping_does_not() -> None:
    first, second = record(0, 8), record(0, 8)

    async def run(traversal: bool) -> float:
        """Return the seconds until a node that failed twice, with an answer in between, may be chosen again."""
        view = view_of(first, second)
        view.report_failure(first.record.node, NodeLost("gone", ""))
        view.report_traversal([first.record.node])
        assert route(view) == [second.record.node], "what began before the failure answers still"
        await asyncio.sleep(16.0)
        view.report_round_trip(first.record.node, 0.01)
        if traversal:
            view.report_traversal([first.record.node, second.record.node])
        view.report_failure(first.record.node, NodeLost("gone again", ""))
        return view.failures.bans.bans[first.record.node].until - asyncio.get_running_loop().time()

    assert run_virtually(run(traversal=True)) == 15.0
    assert run_virtually(run(traversal=False)) == 30.0


async def test_a_change_or_a_timeout_ends_a_wait() -> None:
    view = view_of()
    await view.wait_for_change(0.01)
    view._changed.set()
    await view.wait_for_change(0.0)


def test_a_banned_node_without_a_replica_is_tried_again_soon() -> None:
    async def run() -> None:
        only, first, second = record(0, 4), record(4, 8, port=4002), record(4, 8, port=4003)
        view = view_of(only, first, second)
        for failed in (only, first):
            view.report_failure(failed.record.node, NodeLost("silent", "x"))
        with pytest.raises(MissingBlocks, match="failed lately"):
            route(view)
        await asyncio.sleep(FIRST_RETRY_S)
        assert route(view) == [only.record.node, second.record.node], "the other banned node has a replica"
        view.report_failure(only.record.node, NodeLost("still silent", "x"))
        with pytest.raises(MissingBlocks, match="still silent"):
            route(view)
        await asyncio.sleep(2 * FIRST_RETRY_S)
        assert route(view) == [only.record.node, second.record.node]

    run_virtually(run())


def test_what_the_tail_of_the_route_proposes_counts() -> None:
    def test() -> None:
        head, plain = record(0, 4), record(4, 8, port=4002, rate=1e6)
        good = record(4, 8, port=4003, rate=1e3, speculator="autoregressive")
        middle = record(0, 7, port=4004, speculator="autoregressive")
        assert view_of(head, plain, middle).tail_speculator() is None
        assert view_of(head, plain, good).tail_speculator() is None, "the faster tail has none"
        assert view_of(head, good).tail_speculator() == good.record
        assert view_of(good).tail_speculator() == good.record, "blocks are missing still"
        taps = {"tap_head": "0f" * 8, "taps": (1, 7)}
        reads_both = record(4, 8, port=4003, speculator="autoregressive", **taps)
        assert view_of(head, reads_both).tail_speculator() is None, "the head's node has not its part"
        assert view_of(record(0, 4, **taps), reads_both).tail_speculator() == reads_both.record

    virtually(test)


def test_a_blocking_client_asks_what_the_tail_proposes_from_its_own_thread() -> None:
    async def test() -> None:
        good = record(4, 8, speculator="autoregressive")
        view = view_of()
        following = asyncio.create_task(view.watch())
        await asyncio.sleep(0.01)
        view.snapshot = (record(0, 4, port=4002), good)
        assert await asyncio.to_thread(view.tail_speculator) == good.record
        following.cancel()

    asyncio.run(test())
