"""Texts under rules are those of plain decoding with stock transformers' processors, whatever happens to the swarm."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.sim.test_random_failures import TWICE, cause_failures
from tests.sim.test_recovery import at_token, slow_links
from tests.support.driven_swarm import DrivenSwarm, finish
from tests.support.ruled_texts import KNOBS, RuledGuesser, RuledModel, random_rules
from tests.support.toy_grammar import ToyLibrary
from tests.support.toy_swarm import SPANS, VOCAB, toy_swarm

from treeswarm.errors import BadRequest
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import Grammar, TextRules
from treeswarm.session.logit_edits import RuledText
from treeswarm.session.paths import RowPaths
from treeswarm.session.session import NodeSession
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.virtual_clock import run_virtually

PROMPT = [1, 2, 4, 2, 1]
COUNT = 40
GREEDY, SAMPLED = SamplingSettings(), SamplingSettings(1.3, top_p=0.95, seed=5)
TOY_GRAMMAR = Grammar("regex", "[a-z]+")


def generate(
    rules: TextRules,
    settings: SamplingSettings = GREEDY,
    *,
    seed: int = 0,
    kill_tail_at: int | None = None,
    failures: bool = False,
    prompt: list[int] = PROMPT,
    generations: int = 1,
    **options: Any,
) -> list[list[int]]:
    """Generate texts one after the other in a swarm where any node has a spare, and return the last and the expected.

    The tail is killed when the text has `kill_tail_at` tokens, in the middle of a tree; with `failures` all kinds of
    things happen to all nodes.
    """
    model = RuledModel(rules, len(prompt), settings)
    random_ = random.Random(seed)
    options = {
        "tree_size": random_.choice([1, 5, 12]),
        "segment_rows": random_.choice([2, 4, 64]),
        "patience_s": 120.0,
        **options,
    }

    async def run() -> list[list[int]]:
        network = MemoryNetwork(seed)
        slow_links(network)
        async with toy_swarm(network, spans=TWICE, grammars=ToyLibrary(VOCAB)) as swarm:
            for number in range(generations):
                drafter = RuledGuesser(seed + number, model=model)
                generating = asyncio.create_task(
                    swarm.generate(
                        prompt, COUNT, drafter=drafter, rules=rules, settings=settings, stop_ids=rules.end_tokens,
                        **options,
                    )
                )  # fmt: skip
                if failures:
                    await cause_failures(swarm, random_, generating)
                elif kill_tail_at is not None and number + 1 == generations:
                    await at_token(swarm, kill_tail_at, generating)
                    assert swarm.chain is not None
                    if not generating.done():
                        await asyncio.sleep(0.015)  # answers are on their way
                        await swarm.kill(swarm.chain.hops[-1].address)
                try:
                    text = await generating
                except BadRequest as error:  # in a small vocabulary, rules may leave no token
                    assert "allow no token" in str(error)
                    text = list(swarm.kept)
                    assert model.token([*prompt, *text]) is None
            return [text, model.text(prompt, COUNT)]

    text, expected = run_virtually(run())
    return [text, expected]


@pytest.mark.parametrize("knob", sorted(KNOBS))
def test_each_knob_gives_the_stock_text(knob: str) -> None:
    rules = TextRules(**{knob: KNOBS[knob]}, end_tokens=(0,) if knob == "min_tokens" else ())
    plain = [RuledModel(TextRules(), len(PROMPT), settings).text(PROMPT, COUNT) for settings in (GREEDY, SAMPLED)]
    for settings, without in zip((GREEDY, SAMPLED), plain, strict=True):
        text, expected = generate(rules, settings, seed=len(knob), kill_tail_at=12)
        assert text == expected
        filters_only = knob in ("min_p", "typical_p") and settings.greedy
        assert (text == without) == filters_only, "the knob changes nothing"


@pytest.mark.parametrize("seed", range(10))
def test_random_pairs_survive_random_failures(seed: int) -> None:
    settings = replace(SAMPLED, seed=seed) if seed % 2 else GREEDY
    text, expected = generate(random_rules(seed), settings, seed=seed, failures=True)
    assert text == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_many_random_settings_survive_random_failures(seed: int) -> None:
    settings = SamplingSettings(1.0 + seed % 3 / 4, top_k=4, seed=seed) if seed % 2 else GREEDY
    text, expected = generate(random_rules(seed, 1 + seed % 4), settings, seed=seed, failures=True)
    assert text == expected


def test_rules_count_a_shared_prefix() -> None:
    """The second text begins on kept KV of the first: its tail has never seen those tokens as rows."""
    prompt = [int(token) for token in np.random.default_rng(7).integers(0, VOCAB, 150)]
    rules = TextRules(repetition_penalty=1.4, no_repeat_ngram_size=5)
    text, expected = generate(
        rules, prompt=prompt, generations=2, shared="client", segment_rows=50, kill_tail_at=20, seed=3
    )
    assert text == expected


def test_a_grammar_at_the_tail_follows_every_path() -> None:
    for settings in (GREEDY, SAMPLED):
        rules = TextRules(grammar=TOY_GRAMMAR, frequency_penalty=0.1)
        text, expected = generate(rules, settings, seed=1, kill_tail_at=12)
        assert text == expected


@pytest.mark.parametrize("at", [0, 9])
def test_drivers_obey_rules_also_when_one_is_lost(at: int) -> None:
    """What the first driver generated counts as output for the next one, and for the client itself."""
    rules = TextRules(presence_penalty=0.9, frequency_penalty=0.2, min_tokens=22, end_tokens=(0,))
    expected = RuledModel(rules, len(PROMPT)).text(PROMPT, COUNT)

    async def run() -> None:
        async with toy_swarm(MemoryNetwork(), spans=TWICE) as toys:
            swarm = DrivenSwarm(toys)
            heads = [address for address, span in toys.spans.items() if span == SPANS[0]]
            driver = swarm.offer(heads[0], draft="ngram")
            client = swarm.client(heads[0], draft="ngram")
            run = client.stream(PROMPT, max_new_tokens=COUNT, rules=rules, stop_token_ids=(0,))
            finishing = asyncio.create_task(finish(run))
            while at and len(run.token_ids) < at and not finishing.done():
                await asyncio.sleep(0.001)
            if at:
                await driver.close()
            assert await finishing == expected
            assert run.drivers[0].tokens == (len(expected) if not at else run.drivers[0].tokens) > 0

    run_virtually(run())


# ---------------------------------------------------------------- planted mistakes


class TestPlantedMistakes:
    """Each mistake must be noticed by another text."""

    def noticed(self, rules: TextRules) -> bool:
        for seed in range(6):
            text, expected = generate(rules, seed=seed, kill_tail_at=10, tree_size=12)
            if text != expected:
                return True
        return False

    def test_nothing_is_noticed_without_a_mistake(self) -> None:
        assert not self.noticed(TextRules(frequency_penalty=0.15))
        assert not self.noticed(TextRules(grammar=TOY_GRAMMAR))

    def test_a_penalty_that_counts_a_sibling_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = RuledText._counted

        def careless(self: RuledText, paths: RowPaths, *rest: Any) -> Any:
            return honest(self, replace(paths, parents=np.arange(len(paths.parents)) - 1), *rest)

        monkeypatch.setattr(RuledText, "_counted", careless)
        assert self.noticed(TextRules(frequency_penalty=0.15))

    def test_the_mask_of_the_parent_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = RowPaths.whole
        monkeypatch.setattr(RowPaths, "whole", lambda self: [path[:-1] for path in honest(self)])
        assert self.noticed(TextRules(grammar=TOY_GRAMMAR))

    def test_a_path_lost_at_a_failover_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = NodeSession._apply_replay

        def forgetful(self: NodeSession, append: Any) -> Any:
            step = honest(self, append)
            self._text[:] = [0] * len(self._text)
            return step

        monkeypatch.setattr(NodeSession, "_apply_replay", forgetful)
        assert self.noticed(TextRules(frequency_penalty=0.15))
