"""Tests of what a node logs about clocks: its own, other nodes', clients'."""

import pytest

from treeswarm.protocol.records import LIFETIME_S, NodeState
from treeswarm.registry.clocks import ClockSample
from treeswarm.registry.memory import MemoryRegistry
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.membership import announcer
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.membership.clock_watch import ClockReport, ClockWatch, judge_clocks, lines_for

HOUR, DAY = 3600.0, 86400.0
NOW = 1_800_000_000.0
SET = "set it with `timedatectl set-ntp true`, or in your system's time settings"


def samples(*ahead_s: float, host: str = "10.0.0.{}:1") -> list[ClockSample]:
    return [ClockSample(host.format(i), seconds) for i, seconds in enumerate(ahead_s)]


@pytest.mark.parametrize(
    ("nodes", "clients", "lines"),
    [
        (
            [-HOUR] * 4,
            [],
            [f"this machine's clock is 1 h ahead of those of 4 nodes, so that they refuse this node's records: {SET}"],
        ),
        (
            [2 * DAY, 0.0, 0.0],
            [],
            [
                "the clock of the node at 10.0.0.0:1 is 2 d ahead of this machine's, and its records are refused: "
                "its owner must set it"
            ],
        ),
        ([0.0], [-HOUR], ["the clock of the client at 192.0.2.0 is 1 h behind this machine's: its owner must set it"]),
        (
            [],
            [HOUR],
            [f"this machine's clock is 1 h behind that of 192.0.2.0, and one of the two is wrong: "
                f"if it is this one, {SET}"],
        ),
        ([5.0, -20.0, 50.0], [30.0], []),
    ],
)  # fmt: skip
def test_a_wrong_clock_is_named_with_amount_and_direction(
    nodes: list[float], clients: list[float], lines: list[str]
) -> None:
    report = judge_clocks(samples(*nodes), samples(*clients, host="192.0.2.{}"))
    assert lines_for(report, ClockReport()) == lines
    assert lines_for(report, report) == []  # said once


def test_a_clock_that_was_set_is_said_to_agree_again() -> None:
    wrong = judge_clocks(samples(HOUR, HOUR), [])
    assert lines_for(ClockReport(), wrong) == ["this machine's clock agrees with the others' again"]


def test_a_clock_stepped_while_running_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """The registry's peers and the clients tell the time; what they said stays true when this clock is set."""
    offset = 0.0

    class AskedRegistry(MemoryRegistry):
        async def ask_clocks(self) -> list[ClockSample]:
            return samples(-offset, -offset)

    async def run() -> None:
        nonlocal offset
        steps = list[float]()
        registry = AskedRegistry(MODEL)
        watch = ClockWatch(
            registry, "", clock=lambda: NOW + offset, timer=lambda: 0.0, on_step=lambda: steps.append(offset)
        )
        watch.compare_client("10.0.0.8:50000", int(NOW * 1e6))
        await watch.look()
        assert not caplog.records
        offset = HOUR
        await watch.look()
        offset = 0.0
        await watch.look()
        assert steps == [HOUR, 0.0]

    run_virtually(run())
    assert [entry.getMessage() for entry in caplog.records] == [
        "this machine's clock was set forward by 1 h while the node ran",
        f"this machine's clock is 1 h ahead of those of 3 nodes, so that they refuse this node's records: {SET}",
        "this machine's clock was set back by 1 h while the node ran",
        "this machine's clock agrees with the others' again",
    ]


@pytest.mark.parametrize("back_s", [30.0, HOUR])
def test_own_records_are_believed_after_the_clock_was_set_back(back_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    node, offset = FakeNode(), back_s
    monkeypatch.setattr(announcer.time, "time", lambda: NOW + offset)

    async def run() -> list[int]:
        nonlocal offset
        registry = MemoryRegistry(MODEL, lambda: NOW + offset)

        def make(generation: int, expires: int):  # type: ignore[no-untyped-def]
            return node.record(generation=generation, expires=expires, state=NodeState.ONLINE).record

        membership = Membership(node, make, registry)
        generations = []
        for offset in (back_s, 0.0):
            await membership.announce()
            (sealed,) = await registry.snapshot()
            assert sealed.record.expires == int(NOW + offset) + LIFETIME_S
            generations.append(sealed.record.generation)
        return generations

    before, after = run_virtually(run())
    # Others believed the record of half a minute ahead; they refused the one of an hour ahead.
    assert (after > before) == (back_s < 60)
