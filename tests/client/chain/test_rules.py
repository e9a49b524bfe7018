"""Rules travel to the tail alone, and a tail that does not confirm them is never believed."""

import pytest
from tests.support.toy_swarm import SPANS, toy_swarm

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.text_rules import TextRules
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.virtual_clock import run_virtually


def test_a_tail_that_does_not_confirm_rules_is_left_out() -> None:
    async def run() -> None:
        async with toy_swarm(MemoryNetwork(1)) as swarm:
            with pytest.raises(MissingBlocks, match=f"block {SPANS[-1].start}"):  # only the tail was given up
                await swarm.generate([1, 2, 3], 5, rules=TextRules(repetition_penalty=1.5))
            assert not swarm.kept
            assert len(await swarm.generate([1, 2, 3], 5)) == 5
            swarm.check_idle()

    run_virtually(run())
