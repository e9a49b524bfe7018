"""Waiting for what the tail proposes: as long as it usually takes, never long in vain, and not on a broken chain."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from treeswarm.protocol.messages import Proposal
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.chain.proposals import FIRST_S, LEAST_S, MOST_MISSES, PATIENCE, ProposalInbox

ROOT = 7


def proposal(tip: int) -> Proposal:
    return Proposal(b"s" * 16, 1, tip, ROOT, np.zeros(1, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.float32))


def waits(test: Callable[[ProposalInbox, Callable[[int], Awaitable[float]]], Awaitable[None]]) -> None:
    """Run a test with an inbox, and a function that waits for the proposal below a tip and returns the seconds."""

    async def run() -> None:
        inbox, loop = ProposalInbox(), asyncio.get_running_loop()

        async def wait(tip: int) -> float:
            start = loop.time()
            await inbox.wait(tip, ROOT, asyncio.Event())
            return round(loop.time() - start, 6)

        await test(inbox, wait)

    run_virtually(run(), work_s=0.0)


def test_the_first_proposal_is_waited_for_and_later_ones_as_long_as_they_take() -> None:
    async def test(inbox: ProposalInbox, wait: Callable[[int], Awaitable[float]]) -> None:
        loop = asyncio.get_running_loop()
        for tip in range(5):
            loop.call_later(0.05, inbox.add, proposal(tip))
            assert await wait(tip) == 0.05
        assert await wait(6) == PATIENCE * 0.05

    waits(test)


def test_a_tail_that_never_proposes_is_soon_not_waited_for() -> None:
    async def test(inbox: ProposalInbox, wait: Callable[[int], Awaitable[float]]) -> None:
        spent = [await wait(tip) for tip in range(MOST_MISSES)]
        assert spent[0] == PATIENCE * FIRST_S
        assert spent[-1] == LEAST_S
        assert sum(spent) < 0.9
        assert [await wait(tip) for tip in range(MOST_MISSES, 100)] == [0.0] * (100 - MOST_MISSES)
        inbox.add(proposal(99))  # a late one shows that it proposes after all
        assert await wait(100) == LEAST_S

    waits(test)


def test_a_broken_chain_ends_the_wait_and_is_no_miss() -> None:
    async def test(inbox: ProposalInbox, wait: Callable[[int], Awaitable[float]]) -> None:
        loop, interrupted = asyncio.get_running_loop(), asyncio.Event()
        loop.call_later(0.02, interrupted.set)
        start = loop.time()
        assert await inbox.wait(1, ROOT, interrupted) is None
        assert round(loop.time() - start, 6) == 0.02
        assert await wait(2) == PATIENCE * FIRST_S

    waits(test)
