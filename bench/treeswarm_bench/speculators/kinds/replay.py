"""A generation with a speculator, replayed along a text that the target has written before.

What the target chooses does not depend on the trees: every answer on the path is the text's next token.  So all kinds
are measured on the same texts, and no tree is computed by the target.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessorList

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import gumbel_row
from treeswarm_bench.speculators.target import TappedTarget
from treeswarm_client.drafters.seam import UNANSWERED, Drafter, DraftTree, ProposalReceiver, Verification
from treeswarm_client.drafters.tail.tail_drafter import PROPOSAL_NODES
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest, Speculator

# Number of texts that the target writes together.
WRITTEN_AT_ONCE = 16
ALTERNATIVES = 8
DEEPEST = 64


@dataclass(frozen=True, eq=False)
class KnownText:
    """A prompt, what the target wrote after it, and what the target computes over both."""

    tokens: NDArray[np.int64]
    """Token ids, int64 [n]."""
    prompt: int
    """Number of tokens of the prompt."""
    settings: SamplingSettings
    states: torch.Tensor
    """Results of the tapped blocks, [n, taps · hidden]."""
    alternatives: NDArray[np.int64]
    """The target's best tokens after each token, int64 [n, ALTERNATIVES]."""

    @property
    def written(self) -> list[int]:
        """Tokens that the target wrote."""
        return [int(token) for token in self.tokens[self.prompt :]]


@dataclass(frozen=True)
class Replayed:
    """What a replayed generation came to; the prefill, which has no tree, does not count."""

    tokens: int
    rounds: int
    proposal_s: float
    """Seconds of processor time of all proposals but the first, which reads the prompt."""
    proposals: int
    """Number of these proposals."""


class _AddNoise:
    """Adds the noise of the contract to the logits of each text, so that the best token is the sampled one."""

    def __init__(self, settings: SamplingSettings, lengths: Sequence[int], width: int) -> None:
        self._settings, self._lengths, self._width = settings, lengths, width

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        added = ids.shape[1] - self._width
        rows = [
            gumbel_row(self._settings.seed, self._settings.sample, length + added, logits.shape[-1])
            for length in self._lengths
        ]
        return logits.float() / self._settings.temperature + torch.from_numpy(np.stack(rows)).to(logits.device)


@torch.no_grad()
def write_known_texts(
    target: TappedTarget, prompts: Sequence[Sequence[int]], count: int, settings: SamplingSettings
) -> list[KnownText]:
    """Let the target write `count` tokens after each prompt, and read the texts."""
    texts: list[KnownText] = []
    for start in range(0, len(prompts), WRITTEN_AT_ONCE):
        batch = prompts[start : start + WRITTEN_AT_ONCE]
        for prompt, tokens in zip(batch, _write(target, batch, count, settings), strict=True):
            states, logits = target.read(torch.from_numpy(tokens)[None].to(target.model.device))
            best = logits[0].topk(ALTERNATIVES).indices.cpu().numpy()
            texts.append(KnownText(tokens, len(prompt), settings, states[0].float(), best))
    return texts


def _write(
    target: TappedTarget, prompts: Sequence[Sequence[int]], count: int, settings: SamplingSettings
) -> list[NDArray[np.int64]]:
    width = max(map(len, prompts))
    rows, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, seen, prompt in zip(rows, mask, prompts, strict=True):
        row[width - len(prompt) :] = prompt
        seen[width - len(prompt) :] = 1
    device = target.model.device
    noise = [] if settings.greedy else [_AddNoise(settings, [len(prompt) for prompt in prompts], width)]
    written = target.model.generate(
        torch.from_numpy(rows).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        logits_processor=LogitsProcessorList(noise),
        top_p=None,
        temperature=None,
    )
    added = written[:, width:].cpu().numpy()
    return [np.array([*prompt, *row], np.int64) for prompt, row in zip(prompts, added, strict=True)]


def replay(
    text: KnownText,
    drafter: Drafter,
    size: int,
    speculator: Speculator | None = None,
    clock: Callable[[], float] = time.thread_time,
) -> Replayed:
    """Generate a known text with trees of `size` nodes, which the drafter makes, also from the speculator's."""
    drafter.begin([int(token) for token in text.tokens[: text.prompt]], text.settings)
    memory = None if speculator is None else speculator.new_memory()
    root, read, rounds, spent, last = text.prompt, 0, 0, [], len(text.tokens) - 1
    while root < last:
        if speculator is not None and isinstance(drafter, ProposalReceiver):
            before = clock()
            tree = propose_at(speculator, memory, text, read, root)
            spent.append(clock() - before)
            read = root
            drafter.receive(DraftTree(tree.parents, tree.tokens, tree.scores))
        shipped = drafter.propose(size, DEEPEST)
        verification = _verify(text, root, shipped)
        drafter.observe(verification)
        rounds, root = rounds + 1, root + len(verification.accepted) + 1
    return Replayed(last - text.prompt, rounds, sum(spent[1:]), len(spent[1:]))


def propose_at(speculator: Speculator, memory: Any, text: KnownText, read: int, root: int) -> SpeculatedTree:
    """Return the tree below the token at `root`, when the rows before `read` were read already."""
    first = max(read, root - speculator.window)
    request = SpeculationRequest(
        memory, first, text.states[first:root], text.tokens[first + 1 : root + 1], text.settings, PROPOSAL_NODES
    )
    *_, tree = speculator.propose(request)
    return tree


def _verify(text: KnownText, root: int, tree: DraftTree) -> Verification:
    """Return the target's answers along the text.  It is not asked beside the path."""
    answers = np.full(len(tree) + 1, UNANSWERED)
    alternatives = np.zeros((len(tree) + 1, ALTERNATIVES), np.int64)
    accepted: list[int] = []
    place, at = -1, root
    while True:
        answers[place + 1], alternatives[place + 1] = text.tokens[at + 1], text.alternatives[at]
        child = tree.index.get((place, int(text.tokens[at + 1])))
        if child is None or at + 2 >= len(text.tokens):
            return Verification(tree, answers, accepted, int(text.tokens[at + 1]), alternatives)
        accepted.append(child)
        place, at = child, at + 1


def accepted_at_roots(speculator: Speculator, text: KnownText, sizes: Sequence[int], every: int) -> NDArray[np.int64]:
    """Return the tokens that a traversal brings at every `every`-th token, bonus included, int64 [roots, sizes].

    The roots do not depend on the trees, so kinds and their variants compare at the same places.
    """
    memory, read, brought = speculator.new_memory(), 0, []
    for root in range(text.prompt, len(text.tokens) - 1, every):
        tree = propose_at(speculator, memory, text, read, root)
        read = root
        drafted = DraftTree(tree.parents, tree.tokens, tree.scores)
        brought.append([len(_verify(text, root, drafted.best(size)).accepted) + 1 for size in sizes])
    return np.array(brought, np.int64).reshape(-1, len(sizes))
