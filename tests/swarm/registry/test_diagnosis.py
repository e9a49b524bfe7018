"""Tests of why a search found no node, and of clocks compared with those of nodes."""

import asyncio
from collections.abc import Sequence

import pytest

from treeswarm.errors import Impostor, RecordsRejected, Refused, RouteError, SwarmError, Unreachable, WrongClock
from treeswarm.programs.units import format_rough_duration
from treeswarm.protocol.messages import FaultCode, Records, Watch
from treeswarm.protocol.records import LIFETIME_S
from treeswarm.registry.book import RecordBook, Source
from treeswarm.registry.clocks import ClockDifference, ClockSample, compare_clocks
from treeswarm.registry.diagnosis import Rejection, SearchReport, explain_no_nodes, explain_unanswered
from treeswarm.registry.peers import PeersRegistry
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_bench.virtual_clock import run_virtually

HOUR, DAY = 3600.0, 86400.0
NOW = 1_800_000_000.0
DEAD = Unreachable("no answer from 10.0.0.1:4001 (refused): check the address")
ONE_HOUR_AHEAD = ClockDifference(HOUR, ("a:1", "b:1"), 2)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (61, "61 s"),
        (119, "119 s"),
        (300, "5 min"),
        (3599.7, "1 h"),
        (5400, "1.5 h"),
        (2 * DAY, "2 d"),
        (30 * DAY, "30 d"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert format_rough_duration(seconds) == text


@pytest.mark.parametrize(
    ("report", "error", "words"),
    [
        (SearchReport(("10.0.0.1:4001",), {"10.0.0.1:4001": DEAD}), Unreachable, str(DEAD)),
        (
            SearchReport(unanswered={"a": DEAD, "b": Unreachable("no answer from b:1: check")}),
            Unreachable,
            "none of 2 addresses answers (no answer from 10.0.0.1:4001 (refused); no answer from b:1): "
            "check them, and that the nodes run",
        ),
        (
            SearchReport(rejections=[Rejection("forged", "a:1"), Rejection("other-model", "a:1", "c:1", "big")]),
            RecordsRejected,
            "2 records came from a:1 and none can be used, 1 whose signature is not its node's, "
            "1 of another model (big, of c:1): ask another node, since what this one passes on was changed on its way",
        ),
        (
            SearchReport(rejections=[Rejection("other-version", "a:1", detail="version 2, this release reads 1")] * 2),
            RecordsRejected,
            "2 records came from a:1 and none can be used, 2 of another record version "
            "(version 2, this release reads 1): install the same release here and on the nodes",
        ),
        (
            SearchReport(rejections=[Rejection("expired", "a:1")], clock=ONE_HOUR_AHEAD),
            WrongClock,
            "this machine's clock is 1 h ahead of those of 2 nodes, so that 1 record cannot be believed: "
            "set it with `timedatectl set-ntp true`, or in your system's time settings",
        ),
        (
            SearchReport(rejections=[Rejection("expired", "a:1", "c:1", "signed 1 h ago")]),
            RecordsRejected,
            "1 record came from a:1 and none can be used, 1 expired (signed 1 h ago, of c:1): check the clocks of both "
            "machines, or wait a minute until the nodes announce themselves again",
        ),
        (
            SearchReport(),
            RouteError,
            "no node announces itself here: start `swarm-node MODEL`, or check the name of the swarm",
        ),
    ],
)  # fmt: skip
def test_each_truth_has_its_own_sentence(report: SearchReport, error: type[SwarmError], words: str) -> None:
    explained = explain_no_nodes(report)
    assert (type(explained), str(explained)) == (error, words)


@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        ([HOUR], "this machine's clock is 1 h behind that of peer0, and one of the two is wrong"),
        ([-HOUR] * 4, "this machine's clock is 1 h ahead of those of 4 nodes"),
        ([2 * DAY, 2 * DAY + 30, 0.0], "this machine's clock is 2 d behind those of 2 of 3 nodes"),
        ([HOUR, 0.0, 1.0], None),  # one liar among honest nodes
        ([HOUR, -HOUR], None),  # two that contradict each other
        ([30.0, 40.0, 50.0], None),
        ([], None),
    ],
)
def test_most_nodes_must_agree_on_a_wrong_clock(ahead: Sequence[float], words: str | None) -> None:
    difference = compare_clocks([ClockSample(f"peer{i}", seconds) for i, seconds in enumerate(ahead)])
    assert (str(difference) if difference else None) == words


def test_records_that_dead_nodes_left_are_no_evidence() -> None:
    assert compare_clocks([ClockSample(f"peer{i}", -DAY, is_fresh=False) for i in range(5)]) is None
    assert compare_clocks([ClockSample("a", DAY, is_fresh=False)]) is not None


def test_a_renewed_record_tells_its_nodes_clock() -> None:
    book, node = RecordBook(MODEL, clock=lambda: NOW + HOUR), FakeNode()
    for signed in (NOW, NOW + 60):
        book.add(node.record(4001, generation=int(signed * 1e6), expires=int(signed) + LIFETIME_S).sealed)
    assert book.rejections[node.id].reason == "expired"
    difference = compare_clocks(book.clocks.values())
    assert difference is not None
    assert round(difference.ahead_s) == HOUR - 60


@pytest.mark.parametrize(("off", "reason"), [(HOUR, "expired"), (-2 * DAY, "from-the-future")])
def test_records_are_judged_by_their_senders_clock(off: float, reason: str) -> None:
    book, node = RecordBook(MODEL, clock=lambda: NOW + off), FakeNode()
    sealed = node.record(4001, generation=int(NOW * 1e6), expires=int(NOW) + LIFETIME_S).sealed
    assert book.add(sealed) is None
    assert book.rejected == {reason: 1}
    assert book.add(sealed, Source("a:1", -off)) is not None
    assert len(book.alive()) == 1


def test_a_clock_set_while_it_runs_ends_no_record() -> None:
    steady, offset = 0.0, 0.0
    book, node = RecordBook(MODEL, lambda: NOW + steady + offset, timer=lambda: steady), FakeNode()
    book.add(node.record(4001, generation=int(NOW * 1e6), expires=int(NOW) + LIFETIME_S).sealed)
    offset = DAY
    assert len(book.alive()) == 1
    offset, steady = -DAY, LIFETIME_S + 1.0
    assert not book.alive()


def serve(network: MemoryNetwork, port: int, sealed: Sequence[bytes], clock: float) -> "asyncio.Task[None]":
    async def send_records(_: StreamKind, stream: Stream) -> None:
        assert isinstance(await stream.receive(), Watch)
        await stream.send(Records(tuple(sealed), int(clock * 1e6)))
        await asyncio.Event().wait()

    async def listen() -> None:
        await network.transport().listen(f"127.0.0.1:{port}", send_records)

    return asyncio.ensure_future(listen())


@pytest.mark.parametrize("off", [HOUR, -2 * DAY])
def test_named_nodes_are_found_whatever_the_clock(off: float, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        network = MemoryNetwork()
        for port in (4001, 4002):
            record = FakeNode().record(port, generation=int(NOW * 1e6), expires=int(NOW) + LIFETIME_S)
            await serve(network, port, [record.sealed], NOW)
        addresses = ("127.0.0.1:4001", "127.0.0.1:4002")
        registry = PeersRegistry(
            MODEL, lambda: NOW + off, transport=network.transport(), addresses=addresses, discover=False
        )
        await registry.start()
        assert len(await registry.snapshot()) == 2
        await registry.close()

    run_virtually(run())
    way = "1 h ahead of" if off > 0 else "2 d behind"
    assert (
        f"this machine's clock is {way} those of 2 nodes; their records are judged by their own clocks" in caplog.text
    )


def test_a_node_only_heard_of_cannot_bring_back_old_records() -> None:
    """It claims the time at which they were valid.  The node that the user named has the right time."""

    async def run() -> None:
        network, gone, liar, honest = MemoryNetwork(), FakeNode(), FakeNode(), FakeNode()
        then = NOW - DAY
        old = gone.record(4009, generation=int(then * 1e6), expires=int(then) + LIFETIME_S).sealed
        now = {"generation": int(NOW * 1e6), "expires": int(NOW) + LIFETIME_S}
        own = [honest.record(4001, **now).sealed, liar.record(4002, pin="", **now).sealed]
        await serve(network, 4001, own, NOW)
        await serve(network, 4002, [old], then)
        registry = PeersRegistry(MODEL, lambda: NOW, transport=network.transport(), addresses=("127.0.0.1:4001",))
        await registry.start()
        await asyncio.sleep(10)
        assert registry.rejected["expired"] == 1
        assert {s.record.node for s in await registry.snapshot()} == {honest.id, liar.id}
        await registry.close()

    run_virtually(run())


def test_no_records_from_a_node_of_another_model_says_so() -> None:
    async def run() -> None:
        network = MemoryNetwork()
        await serve(network, 4001, [FakeNode().record(4001, model="cd" * 32, name="big").sealed], 0.0)
        registry = PeersRegistry(MODEL, transport=network.transport(), addresses=("127.0.0.1:4001",))
        with pytest.raises(RecordsRejected, match=r"1 of another model \(big, of 127.0.0.1:4001\): give --model as"):
            await registry.start()

    run_virtually(run())


def test_an_answer_says_more_than_silence() -> None:
    refused = Refused("this is a private swarm, and the caller has no swarm key", FaultCode.WRONG_SWARM_KEY)
    impostor, silent, busy = Impostor("another key"), Unreachable("no answer from b:1"), Refused("too many streams")
    for answer in (refused, impostor):
        assert explain_unanswered({"b:1": silent, "a:1": answer, "c:1": silent}) is answer
    assert isinstance(explain_unanswered({"b:1": silent, "a:1": busy}), Unreachable)
