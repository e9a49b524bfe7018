"""Trees that the tail's speculator proposes, on a virtual clock: exact text, and as many tokens as they guess right."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from tests.sim.test_recovery import TWICE, at_token, check_idle_after_leases, slow_links
from tests.support.toy_swarm import SPANS, ToySpeculator, ToySwarm, plain_text, toy_swarm

from treeswarm.protocol.messages import Proposal
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.fixed_size import FixedSizePolicy
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.drafters.seam import DraftTree, Verification
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_client.drafters.tail.tail_drafter import TailDrafter
from treeswarm_client.drafters.union import UnionDrafter
from treeswarm_node.speculator.self_check import CHECKED_TOKENS, CheckedSpeculator, HeadVerdict

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 60


def generate(
    speculator: ToySpeculator | None, *, segment_rows: int = 16, drafter: TailDrafter | UnionDrafter | None = None
) -> ToySwarm:
    """Generate with the tail's proposals alone, or another drafter; the text must be the plain one."""

    async def run() -> ToySwarm:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, speculator=speculator) as swarm:
            text = await swarm.generate(
                PROMPT,
                COUNT,
                tree_size=6,
                segment_rows=segment_rows,
                drafter=drafter or TailDrafter(),
                policy=FixedSizePolicy(6),
            )
            assert text == plain_text(PROMPT, COUNT)
            await check_idle_after_leases(swarm)
            return swarm

    return run_virtually(run())


def test_right_proposals_bring_seven_tokens_per_traversal() -> None:
    speculator = ToySpeculator(luck=1.0)
    swarm = generate(speculator)
    assert swarm.traversals == 1 + -(-(COUNT - 1) // 7)
    # The prompt is read once, and then each walk's rows alone.
    assert speculator.rows_read[0] == len(PROMPT)
    assert set(speculator.rows_read[1:-1]) == {7}


def test_the_tail_counts_its_trees_and_what_they_got_right() -> None:
    async def run(luck: float) -> tuple[int, int]:
        async with toy_swarm(MemoryNetwork(1), speculator=ToySpeculator(luck=luck)) as swarm:
            await swarm.generate(PROMPT, COUNT, segment_rows=16, drafter=TailDrafter(), policy=FixedSizePolicy(6))
            stage = swarm.nodes[next(iter(swarm.speculating))].stage
            assert stage is not None
            assert swarm.recorder.proposals >= swarm.traversals - 2, "all rounds but the prompt's and perhaps the last"
            return stage.engine.counters.proposals, stage.engine.counters.proposed_right

    assert run_virtually(run(0.0))[1] == 0
    proposals, right = run_virtually(run(1.0))
    # The walk's tokens after the bonus token that the proposal stands below; the last proposal is judged by none.
    assert right >= 6 * (proposals - 2)


def test_a_walk_that_goes_on_in_a_later_append_is_proposed_for_again() -> None:
    """Rows that were read for the shorter walk are not read again."""
    speculator = ToySpeculator(luck=1.0)
    assert generate(speculator, segment_rows=4).traversals == 1 + -(-(COUNT - 1) // 7)
    assert set(speculator.rows_read[1:-2]) == {3, 4}


class ListeningTail(TailDrafter):
    """A drafter that checks what it receives against the text so far: a right speculator must name what follows."""

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        super().begin(prompt, settings)
        self.text, self.received = list(prompt), 0

    def receive(self, tree: DraftTree) -> None:
        super().receive(tree)
        assert tree.tokens.tolist() == plain_text(self.text, len(tree))
        self.received += 1

    def observe(self, verification: Verification) -> None:
        super().observe(verification)
        self.text += [*verification.tree.tokens[list(verification.accepted)].tolist(), verification.bonus]


@pytest.mark.parametrize("segment_rows", [1, 2, 4, 16])
def test_a_proposal_follows_the_walk_of_the_whole_tree(segment_rows: int) -> None:
    """A tree is cut into appends; the tail may propose too early, below the walk of the first ones alone."""
    drafter, speculator = ListeningTail(), ToySpeculator(luck=1.0)
    swarm = generate(speculator, segment_rows=segment_rows, drafter=drafter)
    assert swarm.traversals == 1 + -(-(COUNT - 1) // 7)
    assert drafter.received >= swarm.traversals - 2
    assert len(speculator.roots) >= drafter.received
    if segment_rows == 16:
        assert len(speculator.roots) <= swarm.traversals, "nothing is proposed in vain where a tree is one append"


def test_text_is_exact_whatever_is_proposed() -> None:
    wrong = ToySpeculator(luck=0.0)
    assert generate(wrong).traversals == COUNT
    lucky = ToySpeculator(luck=0.7)
    assert generate(lucky).traversals < COUNT
    full = [*PROMPT, *plain_text(PROMPT, COUNT)]
    assert all(text == full[: len(text)] for text in lucky.roots)


def seconds_without_proposals(speculator: CheckedSpeculator | None) -> float:
    """Return the virtual time that a text takes if nothing is guessed right."""

    async def run() -> float:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, speculator=speculator) as swarm:
            before = asyncio.get_running_loop().time()
            text = await swarm.generate(
                PROMPT, CHECKED_TOKENS + 40, tree_size=6, drafter=TailDrafter(), policy=FixedSizePolicy(6)
            )
            assert text == plain_text(PROMPT, CHECKED_TOKENS + 40)
            return asyncio.get_running_loop().time() - before

    return run_virtually(run())


def test_a_refused_head_stops_and_its_clients_do_not_wait_for_it() -> None:
    """The whole text takes as long as with a tail that is not asked for proposals."""
    toy = ToySpeculator(luck=0.0)
    checked = CheckedSpeculator(toy, "org/head")
    seconds = seconds_without_proposals(checked)
    assert checked.comparison.verdict is HeadVerdict.REFUSED
    assert CHECKED_TOKENS <= len(toy.roots) < CHECKED_TOKENS + 10
    assert seconds == pytest.approx(seconds_without_proposals(None))


def test_a_tail_without_a_speculator_is_not_asked() -> None:
    assert generate(None).traversals == COUNT


def test_other_drafters_get_no_proposals() -> None:
    async def run() -> None:
        speculator = ToySpeculator()
        async with toy_swarm(MemoryNetwork(1), speculator=speculator) as swarm:
            assert await swarm.generate(PROMPT, COUNT) == plain_text(PROMPT, COUNT)
        assert not speculator.roots

    run_virtually(run())


def test_a_union_merges_proposals() -> None:
    drafter = UnionDrafter([SuffixDrafter(), TailDrafter()])
    assert generate(ToySpeculator(luck=1.0), drafter=drafter).traversals < COUNT // 3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("victim", ["tail", "head", "control"])
def test_a_new_tail_reads_the_replayed_rows(victim: str, seed: int) -> None:
    """The speculator of a tail that replaces another one knows the whole text, and proposes in the next round."""
    speculator = ToySpeculator(luck=1.0)

    async def run() -> int:
        network = MemoryNetwork(seed)
        slow_links(network)
        async with toy_swarm(network, spans=TWICE, speculator=speculator) as swarm:
            generating = asyncio.create_task(
                swarm.generate(
                    PROMPT, COUNT, tree_size=6, patience_s=60.0, drafter=TailDrafter(), policy=FixedSizePolicy(6)
                )
            )
            await at_token(swarm, 20, generating)
            assert swarm.chain is not None
            hop = swarm.chain.hops[0 if victim == "head" else -1]
            if victim == "control":
                await swarm.nodes[hop.address].sessions[swarm.chain.options.session].client.control.end()
            else:
                await swarm.kill(hop.address)
            assert await asyncio.wait_for(generating, 600) == plain_text(PROMPT, COUNT)
            await check_idle_after_leases(swarm)
            return swarm.traversals

    traversals = run_virtually(run())
    full = [*PROMPT, *plain_text(PROMPT, COUNT)]
    assert all(text == full[: len(text)] for text in speculator.roots)
    assert traversals <= 1 + -(-(COUNT - 1) // 7) + 3


@pytest.mark.parametrize("first_proposes", [True, False])
def test_a_drafter_goes_on_when_only_one_of_two_tails_proposes(first_proposes: bool) -> None:
    """The union proposes n-grams without waiting, and takes what a tail proposes as soon as one does."""
    speculator = ToySpeculator(luck=1.0)

    async def run() -> tuple[int, int]:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, spans=SPANS[:2]) as swarm:
            tails = []
            for proposes in (first_proposes, not first_proposes):
                swarm.speculator = speculator if proposes else None
                tails.append(await swarm.start(SPANS[-1]))
            second = swarm.spans.pop(tails[1])  # the first one is used as long as it lives
            drafter = UnionDrafter([SuffixDrafter(), TailDrafter()])
            generating = asyncio.create_task(
                swarm.generate(PROMPT, COUNT, tree_size=6, patience_s=60.0, drafter=drafter, policy=FixedSizePolicy(6))
            )
            await at_token(swarm, 30, generating)
            swarm.spans[tails[1]] = second
            assert swarm.chain is not None
            proposed, traversals = len(speculator.roots), swarm.traversals
            assert swarm.chain.proposes is first_proposes
            await swarm.kill(tails[0])
            assert await asyncio.wait_for(generating, 600) == plain_text(PROMPT, COUNT)
            assert swarm.chain.proposes is not first_proposes
            await check_idle_after_leases(swarm)
            assert (proposed > 0) is first_proposes
            return traversals, swarm.traversals - traversals

    before, after = run_virtually(run())
    right, alone = (before, after) if first_proposes else (after, before)
    assert right < alone, "a right proposal brings seven tokens"


def test_a_tail_that_says_that_it_proposes_nothing_is_not_waited_for() -> None:
    """Its record promises a speculator, and its span in this session lacks a block that the speculator reads."""

    async def seconds(speculator: ToySpeculator | None) -> float:
        network, loop = MemoryNetwork(1), asyncio.get_running_loop()
        async with toy_swarm(network, speculator=speculator) as swarm:
            start = loop.time()
            text = await swarm.generate(PROMPT, COUNT, drafter=TailDrafter(), policy=FixedSizePolicy(6))
            assert text == plain_text(PROMPT, COUNT)
            return loop.time() - start

    blind = ToySpeculator(taps=(0,))
    assert run_virtually(seconds(blind)) == run_virtually(seconds(None))
    assert not blind.roots


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokens": np.array([5], np.uint32)}, "proposed a token outside the vocabulary"),
        (
            {
                "parents": np.arange(200, dtype=np.uint32),
                "tokens": np.zeros(200, np.uint32),
                "scores": np.zeros(200, np.float32),
            },
            "proposed 200 nodes, 128 were asked for",
        ),
    ],
)
def test_a_tail_that_proposes_what_was_not_asked_for_is_dropped(changes: dict[str, np.ndarray], problem: str) -> None:
    async def run() -> None:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, spans=TWICE, speculator=ToySpeculator()) as swarm:
            generating = asyncio.create_task(
                swarm.generate(
                    PROMPT, COUNT, tree_size=6, patience_s=60.0, drafter=TailDrafter(), policy=FixedSizePolicy(6)
                )
            )
            await at_token(swarm, 20, generating)
            assert swarm.chain is not None
            chain, tail = swarm.chain, swarm.chain.hops[-1]
            session = swarm.nodes[tail.address].sessions[chain.options.session]
            fields = {
                "parents": np.zeros(1, np.uint32),
                "tokens": np.zeros(1, np.uint32),
                "scores": np.zeros(1, np.float32),
            }
            await session.client.send_proposal(
                Proposal(chain.options.session, session.epoch.number, 1, 1, **fields | changes)
            )
            assert await asyncio.wait_for(generating, 600) == plain_text(PROMPT, COUNT)
            (repair,) = chain.repairs
            ((lost, reason),) = repair.lost
            assert lost == tail
            assert problem in reason

    run_virtually(run())
