"""Texts under a grammar are those of plain decoding with the same masks, for all drafters and lost nodes."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.sim.test_random_failures import TWICE, cause_failures
from tests.sim.test_recovery import at_token, slow_links
from tests.support.ruled_texts import RuledGuesser
from tests.support.toy_letters import END, LettersModel, letters_compiler
from tests.support.toy_swarm import VOCAB, toy_swarm

from treeswarm.errors import SwarmError
from treeswarm.grammar.bits import Mask, allowed_tokens
from treeswarm.grammar.masks import TextMasks
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import Grammar, RulesRequest, TextRules
from treeswarm.session.paths import RowPaths
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.virtual_clock import run_virtually

PROMPT = [1, 2, 4, 2, 1]
COUNT = 40
# With runs of forced letters of many lengths, and with branches.
PATTERNS = (
    "((abcd|bcdda|cab|dd)(a|b|c)?)*",
    "(ab{12}c|(ac|bd){2,3})*d{5}(a|b)*",
    "[abd](cccc[ab])*c?",
    "(a|b)dcba",
    "([abcd]{2}bbb)*",
)
GREEDY, SAMPLED = SamplingSettings(), SamplingSettings(1.5, seed=5)
COMPILER = letters_compiler()


def rules_of(pattern: str, **knobs: Any) -> TextRules:
    return TextRules(grammar=Grammar("regex", pattern), end_tokens=(END,), **knobs)


def generate(
    pattern: str,
    settings: SamplingSettings = GREEDY,
    *,
    seed: int = 0,
    longest_run: int = 8,
    kill_tail_at: int | None = None,
    failures: bool = False,
    prompt: Sequence[int] = PROMPT,
    generations: int = 1,
    knobs: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[list[int], list[int], int]:
    """Generate texts one after the other where any node has a spare.

    Return the last one, the expected one, and its number of traversals.  The tail is killed when the text has
    `kill_tail_at` tokens; with `failures` all kinds of things happen to all nodes.
    """
    rules = rules_of(pattern, **(knobs or {}))
    model = LettersModel(pattern, rules, len(prompt), settings)
    random_ = random.Random(seed)
    sizes = {"tree_size": random_.choice([1, 5, 12]), "segment_rows": random_.choice([2, 4, 64]), "patience_s": 120.0}

    async def run() -> list[int]:
        network = MemoryNetwork(seed)
        slow_links(network)
        async with toy_swarm(network, spans=TWICE, grammars=COMPILER) as swarm:
            for number in range(generations):
                generating = asyncio.create_task(
                    swarm.generate(
                        prompt, COUNT, drafter=RuledGuesser(seed + number, model=model), rules=rules,
                        settings=settings, stop_ids=(END,), longest_run=longest_run,
                        grammar=COMPILER.open(RulesRequest(rules, len(prompt))), **{**sizes, **options},
                    )
                )  # fmt: skip
                if failures:
                    await cause_failures(swarm, random_, generating)
                elif kill_tail_at is not None and number + 1 == generations:
                    await at_token(swarm, kill_tail_at, generating)
                    if not generating.done():
                        assert swarm.chain is not None
                        await asyncio.sleep(0.015)  # answers are on their way
                        await swarm.kill(swarm.chain.hops[-1].address)
                text = await generating
            return [*text, swarm.traversals]

    *text, traversals = run_virtually(run())
    return text, model.text(prompt, COUNT), traversals


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_that_of_plain_decoding(pattern: str, settings: SamplingSettings) -> None:
    for seed in range(3):
        text, expected, _ = generate(pattern, settings, seed=seed, kill_tail_at=5 if seed else None)
        assert text == expected


@pytest.mark.parametrize("seed", range(8))
def test_text_survives_random_failures(seed: int) -> None:
    settings = replace(SAMPLED, seed=seed) if seed % 2 else GREEDY
    knobs = {"frequency_penalty": 0.15} if seed % 3 else {}
    text, expected, _ = generate(PATTERNS[seed % len(PATTERNS)], settings, seed=seed, failures=True, knobs=knobs)
    assert text == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_text_survives_many_random_failures(seed: int) -> None:
    settings = SamplingSettings(1.0 + seed % 3 / 4, top_k=4, seed=seed) if seed % 2 else GREEDY
    run = (0, 3, 20)[seed % 3]
    text, expected, _ = generate(PATTERNS[seed % 5], settings, seed=seed, failures=True, longest_run=run)
    assert text == expected


def test_grammar_begins_after_a_shared_prefix() -> None:
    """The second text begins on kept KV of the first: its tail has never seen those tokens as rows."""
    prompt = [int(token) for token in np.random.default_rng(7).integers(0, VOCAB, 150)]
    text, expected, _ = generate(
        PATTERNS[0], prompt=prompt, generations=2, shared="client", segment_rows=50, kill_tail_at=20, seed=3
    )
    assert text == expected


def test_a_forced_run_comes_in_one_traversal() -> None:
    """A drafter that knows nothing drafts nothing, and the eighteen forced tokens come with the one before them."""
    pattern = "[ab]cccccccccdddddddddd"
    text, expected, traversals = generate(pattern, longest_run=30, tree_size=1, segment_rows=64)
    assert text == expected == [text[0], *[3] * 9, *[4] * 10, END]
    assert traversals == 2
    assert generate(pattern, longest_run=0, tree_size=1)[2] > 10
    assert generate(pattern, longest_run=7, tree_size=1)[2] <= 4


def test_a_run_ends_at_the_limit_of_tokens() -> None:
    text, expected, traversals = generate("a{60}", longest_run=64, tree_size=1)
    assert text == expected == [1] * COUNT
    assert traversals == 2


def test_a_tail_that_leaves_the_grammar_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client follows the grammar too: what the first tail writes outside of it is never part of a text."""
    honest, opened = TextMasks.allowed, []

    def careless(self: TextMasks, paths: RowPaths) -> Mask:
        opened.append(self)
        masks = honest(self, paths)
        return masks if self is not opened[0] else np.where(masks.any(1)[:, None], 0b11111, masks).astype(np.uint32)

    monkeypatch.setattr(TextMasks, "allowed", careless)
    text, expected, _ = generate(PATTERNS[0], tree_size=5)
    assert text == expected
    assert len(set(map(id, opened))) > 1


class TestPlantedMistakes:
    """Each mistake of a tail must be noticed, by another text or by the client."""

    def noticed(self, pattern: str, **options: Any) -> bool:
        for seed in range(4):
            try:
                text, expected, _ = generate(pattern, seed=seed, tree_size=12, patience_s=1.0, **options)
            except SwarmError:
                return True
            if text != expected:
                return True
        return False

    def test_nothing_is_noticed_without_a_mistake(self) -> None:
        assert not self.noticed(PATTERNS[0])

    def test_the_mask_of_the_parent_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = RowPaths.below
        monkeypatch.setattr(RowPaths, "below", lambda self: [path[:-1] for path in honest(self)])
        assert self.noticed(PATTERNS[0])

    def test_the_mask_of_a_sibling_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = TextMasks.allowed
        monkeypatch.setattr(TextMasks, "allowed", lambda self, paths: np.roll(honest(self, paths), 1, axis=0))
        assert self.noticed(PATTERNS[0])

    def test_a_prompt_that_counts_as_text_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = TextMasks.allowed

        def shifted(self: TextMasks, paths: RowPaths) -> Mask:
            return honest(replace_length(self), paths)

        def replace_length(masks: TextMasks) -> TextMasks:
            masks.prompt_length = len(PROMPT) + 1
            return masks

        monkeypatch.setattr(TextMasks, "allowed", shifted)
        assert self.noticed("(ab|cd)*")


def test_letters_are_what_the_library_allows() -> None:
    """The reference of these tests is another library, and both agree on random texts."""
    random_ = random.Random(1)
    for pattern in PATTERNS:
        model, masks = LettersModel(pattern, TextRules(), 0), COMPILER.begin(Grammar("regex", pattern), [END])
        text: list[int] = []
        while len(text) < 25:
            allowed = allowed_tokens(masks.after(text, [()])[0]).tolist()
            assert allowed == model.allowed(text)
            following = [token for token in allowed if token != END]
            if not following:
                break
            text.append(random_.choice(following))
