"""A head's taps lie on three nodes: what the tail reads is what one node would compute, and the text is exact."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from tests.sim.test_recovery import TWICE, at_token, check_idle_after_leases, slow_links
from tests.support.toy_swarm import SPANS, ToySwarm, plain_text, toy_swarm
from tests.support.toy_taps import ToyTapSpeculator

from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import TapSums
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.fixed_size import FixedSizePolicy
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.drafters.tail.tail_drafter import TailDrafter
from treeswarm_node.engine import tap_slice
from treeswarm_node.speculator.followed_text import MOST_UNKNOWN

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 60
FULL = [*PROMPT, *plain_text(PROMPT, COUNT)]
FEWEST = 1 + -(-(COUNT - 1) // 7)
"""Number of traversals when each tree of six nodes is right."""
ToSwarm = Callable[[ToySwarm], Coroutine[Any, Any, None]]


async def leave_alone(_: ToySwarm) -> None:
    pass


def generate(
    speculator: ToyTapSpeculator,
    spans: list[Span] = SPANS,
    *,
    prepare: ToSwarm = leave_alone,
    disturb: ToSwarm = leave_alone,
    segment_rows: int = 16,
) -> ToySwarm:
    """Generate with proposals alone, and disturb the swarm after twenty tokens.  The text must be the plain one."""

    async def run() -> ToySwarm:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, spans=spans, speculator=speculator) as swarm:
            await prepare(swarm)
            generating = asyncio.create_task(
                swarm.generate(
                    PROMPT,
                    COUNT,
                    tree_size=6,
                    segment_rows=segment_rows,
                    patience_s=60.0,
                    drafter=TailDrafter(),
                    policy=FixedSizePolicy(6),
                )
            )
            await at_token(swarm, 20, generating)
            await disturb(swarm)
            assert await asyncio.wait_for(generating, 600) == FULL[len(PROMPT) :]
            await check_idle_after_leases(swarm)
            return swarm

    return run_virtually(run())


@pytest.mark.parametrize("spans", [SPANS, [Span(0, 1), Span(1, 2), Span(2, 3), Span(3, 4)], [Span(0, 3), Span(3, 4)]])
def test_every_row_read_has_the_taps_of_all_nodes(spans: list[Span]) -> None:
    """A node without a tapped block passes sums on, and one with two of them adds both."""
    speculator = ToyTapSpeculator(FULL)
    swarm = generate(speculator, spans)
    assert swarm.traversals == FEWEST
    assert len(speculator.rows_read[0]) == len(PROMPT)
    assert all(all(known) for known in speculator.rows_read)


def test_only_the_last_rows_of_a_prompt_have_sums() -> None:
    speculator = ToyTapSpeculator(FULL, window=3)
    swarm = generate(speculator, segment_rows=4)
    assert swarm.traversals == FEWEST
    assert speculator.first_positions[0] == len(PROMPT) - 3
    devices = [device for device in swarm.devices.values() if device.sums_sent]
    # The prompt came in appends of four and three rows; the first of them needs no sums.
    assert [device.sums_sent[0] for device in devices] == [3, 3]


def test_rows_without_sums_are_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the best rows of a tree have sums: the head goes on below them by itself."""
    monkeypatch.setattr(tap_slice, "ROWS_WITH_SUMS", 3)
    speculator = ToyTapSpeculator(FULL)
    assert generate(speculator).traversals == FEWEST
    assert {tuple(known[-7:]) for known in speculator.rows_read[2:-1]} == {(True,) * 3 + (False,) * 4}


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
def test_a_replaced_node_brings_the_sums_again(place: int) -> None:
    """Rows that are replayed have the sums that their upstream node sent before."""
    speculator = ToyTapSpeculator(FULL)

    async def kill(swarm: ToySwarm) -> None:
        assert swarm.chain is not None
        await swarm.kill(swarm.chain.hops[place].address)

    swarm = generate(speculator, TWICE, disturb=kill)
    assert swarm.traversals <= FEWEST + 2
    assert all(all(known) for known in speculator.rows_read)


@pytest.mark.parametrize("place", [0, 1], ids=["head", "middle"])
def test_a_node_without_the_head_means_no_proposals(place: int, caplog: pytest.LogCaptureFixture) -> None:
    """It may be of an older release, or of an owner who does not want the head: it is asked for nothing."""
    speculator = ToyTapSpeculator(FULL)

    async def start_others(swarm: ToySwarm) -> None:
        for i, span in enumerate(SPANS):
            await swarm.start(span, has_head=i != place)

    swarm = generate(speculator, [], prepare=start_others)
    assert swarm.traversals == COUNT
    assert not speculator.rows_read
    assert not any(device.sums_sent for device in swarm.devices.values())
    assert "reads the results of blocks 0, 2, 3" in caplog.text
    assert f"with blocks {SPANS[place]} cannot add theirs" in caplog.text


def test_a_new_node_without_the_head_ends_the_proposals() -> None:
    speculator = ToyTapSpeculator(FULL)
    reads: list[int] = []

    async def replace_middle(swarm: ToySwarm) -> None:
        assert swarm.chain is not None
        await swarm.start(SPANS[1], has_head=False)
        await swarm.kill(swarm.chain.hops[1].address)
        reads.append(len(speculator.rows_read))

    swarm = generate(speculator, disturb=replace_middle)
    assert swarm.traversals > FEWEST + 20
    assert len(speculator.rows_read) <= reads[0] + 1


def test_proposals_come_again_with_a_node_that_has_the_head() -> None:
    speculator = ToyTapSpeculator(FULL)

    async def start_others(swarm: ToySwarm) -> None:
        for i, span in enumerate(SPANS):
            await swarm.start(span, has_head=i != 1)

    async def replace_middle(swarm: ToySwarm) -> None:
        assert swarm.chain is not None
        await swarm.start(SPANS[1])
        await swarm.kill(swarm.chain.hops[1].address)

    swarm = generate(speculator, [], prepare=start_others, disturb=replace_middle)
    assert 20 < swarm.traversals < 20 + FEWEST
    # The tail has rows from before that never had sums: it begins to read after them.
    assert speculator.first_positions[0] >= len(PROMPT) + 20 - MOST_UNKNOWN


def spoil(change: Callable[[TapSums], TapSums]) -> ToSwarm:
    """Return what makes the middle node send other sums than it should."""

    async def prepare(swarm: ToySwarm) -> None:
        device = next(swarm.devices[address] for address, span in swarm.spans.items() if span == SPANS[1])
        original = device.run

        def run(segments: Any) -> Any:
            results = original(segments)
            return [r if r.tap_sums is None else replace(r, tap_sums=change(r.tap_sums)) for r in results]

        device.run = run  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(
    "change",
    [
        lambda sums: replace(sums, data=sums.data + bytes(sums.count)),
        lambda sums: replace(sums, data=sums.data[: sums.count]),
        lambda sums: replace(sums, data=b"\xff" * len(sums.data)),
        lambda sums: replace(sums, blocks=(0, 1)),
        lambda sums: replace(sums, blocks=(0, 2, 3)),
    ],
    ids=["longer", "shorter", "not finite", "other blocks", "the tail's own block"],
)
def test_false_sums_count_as_missing(change: Callable[[TapSums], TapSums]) -> None:
    speculator = ToyTapSpeculator(FULL)
    assert generate(speculator, prepare=spoil(change)).traversals == COUNT
    assert not speculator.rows_read
