"""Rules travel to the tail alone, and a tail that does not confirm them is never believed."""

import pytest
from tests.support.toy_grammar import ToyLibrary
from tests.support.toy_swarm import SPANS, VOCAB, toy_swarm

from treeswarm.errors import BadRequest, MissingBlocks
from treeswarm.protocol.text_rules import Grammar, TextRules
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_node.sessions import session_table


def test_a_tail_that_does_not_confirm_rules_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node of an older release ignores what it does not know."""
    monkeypatch.setattr(session_table, "_rules", lambda *_: None)

    async def run() -> None:
        async with toy_swarm(MemoryNetwork(1)) as swarm:
            with pytest.raises(MissingBlocks, match=f"block {SPANS[-1].start}"):  # only the tail was given up
                await swarm.generate([1, 2, 3], 5, rules=TextRules(repetition_penalty=1.5))
            assert not swarm.kept
            assert len(await swarm.generate([1, 2, 3], 5)) == 5
            swarm.check_idle()

    run_virtually(run())


def test_rules_that_allow_no_token_end_the_text_with_their_reason() -> None:
    async def run() -> None:
        rules = TextRules(bad_words=tuple((1, token) for token in range(VOCAB)), logit_bias=((1, 5.0),))
        async with toy_swarm(MemoryNetwork(1)) as swarm:
            with pytest.raises(BadRequest, match="allow no token after 1 generated ones"):
                await swarm.generate([1, 2, 3], 5, rules=rules, drafter=SuffixDrafter())
            assert swarm.kept == [1]
            assert len(await swarm.generate([1, 2, 3], 5)) == 5  # no node was given up for it

    run_virtually(run())


def test_a_grammar_that_no_tail_takes_is_a_bad_request() -> None:
    async def run() -> None:
        rules = TextRules(grammar=Grammar("regex", "broken"))
        async with toy_swarm(MemoryNetwork(1), grammars=ToyLibrary(VOCAB)) as swarm:
            with pytest.raises(BadRequest, match="cannot be applied: the grammar is broken"):
                await swarm.generate([1, 2, 3], 5, rules=rules)
            assert len(await swarm.generate([1, 2, 3], 5)) == 5

    run_virtually(run())
