"""A replayed generation counts the rounds that a real one takes, and asks the speculator as a session does."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tests.bench.speculators.test_training import decided_model

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import gumbel_row
from treeswarm_bench.speculators.kinds.replay import KnownText, accepted_at_roots, replay, write_known_texts
from treeswarm_bench.speculators.target import TappedTarget
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.tail.tail_drafter import TailDrafter
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest

PROMPT, COUNT = 5, 13


@dataclass(eq=False)
class KnowingSpeculator:
    """Guesses the next `depth` tokens of a text, which it knows, as a chain."""

    tokens: np.ndarray
    depth: int
    window: int = 4
    asked: list[tuple[int, int]] = field(default_factory=list)
    """First row and root of every request."""
    name = "knowing"
    taps = (0,)

    def new_memory(self) -> None:
        return None

    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        self.asked.append((request.first_position, request.root_position))
        rows = slice(request.first_position, request.root_position)
        assert request.states[:, 0].tolist() == list(range(*rows.indices(len(self.tokens))))
        assert request.next_tokens.tolist() == self.tokens[rows.start + 1 : rows.stop + 1].tolist()
        guesses = self.tokens[request.root_position + 1 :][: self.depth]
        parents = np.arange(len(guesses)) - 1
        yield SpeculatedTree(parents, guesses, -np.arange(len(guesses), dtype=np.float32) / 10)


def known_text() -> KnownText:
    """Return a text whose states are the numbers of its rows."""
    tokens = np.random.default_rng(0).permutation(100)[: PROMPT + COUNT]
    states = torch.arange(PROMPT + COUNT, dtype=torch.float32)[:, None]
    return KnownText(tokens, PROMPT, SamplingSettings(), states, np.zeros((PROMPT + COUNT, 8), np.int64))


@pytest.mark.parametrize(("depth", "rounds"), [(0, 12), (1, 6), (2, 4), (3, 3), (20, 1)])
def test_rounds_are_those_of_the_accepted_paths(depth: int, rounds: int) -> None:
    """The first of 13 written tokens comes with the prefill; each round brings its path and the bonus token."""
    text = known_text()
    ticks = iter(range(100))
    found = replay(text, TailDrafter(), 64, KnowingSpeculator(text.tokens, depth), lambda: float(next(ticks)))
    assert (found.tokens, found.rounds, found.proposals) == (COUNT - 1, rounds, rounds - 1)
    assert found.proposal_s == rounds - 1
    assert replay(text, NoneDrafter(), 64).rounds == COUNT - 1


def test_rows_are_asked_for_once_and_no_more_than_the_window() -> None:
    text = known_text()
    speculator = KnowingSpeculator(text.tokens, 2)
    replay(text, TailDrafter(), 64, speculator)
    assert speculator.asked == [(1, 5), (5, 8), (8, 11), (11, 14)]


def test_the_same_roots_are_tried_whatever_is_accepted() -> None:
    text = known_text()
    found = accepted_at_roots(KnowingSpeculator(text.tokens, 4), text, (2, 64), every=3)
    assert found.tolist() == [[3, 5], [3, 5], [3, 5], [3, 3]]


def test_known_texts_are_what_the_target_chooses() -> None:
    """Greedy and sampled texts follow the target's logits over the whole text, noise included."""
    target = TappedTarget(decided_model(), (2, 3))
    prompts = [list(range(1, 12)), [7, 8, 9, 10]]
    for settings in (SamplingSettings(), SamplingSettings(temperature=0.8, seed=3)):
        texts = write_known_texts(target, prompts, 6, settings)
        for prompt, text in zip(prompts, texts, strict=True):
            assert text.tokens[: text.prompt].tolist() == prompt
            assert len(text.written) == 6
            states, logits = target.read(torch.from_numpy(text.tokens)[None])
            assert torch.equal(states[0], text.states)
            assert text.alternatives[:, 0].tolist() == logits[0].argmax(-1).tolist()
            for place in range(text.prompt, len(text.tokens)):
                assert int(text.tokens[place]) == _chosen(logits[0, place - 1], settings, place)


def _chosen(logits: Any, settings: SamplingSettings, position: int) -> int:
    if settings.greedy:
        return int(logits.argmax())
    noise = torch.from_numpy(gumbel_row(settings.seed, settings.sample, position, len(logits)))
    return int((logits / settings.temperature + noise).argmax())
