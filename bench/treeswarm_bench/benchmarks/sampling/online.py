"""`swarm bench online`: a draft that learns from the target's answers while a text grows; one process, no swarm.

After every round of some tokens, the draft's output layer is trained on the target's eight best tokens with their
logits, which a tail could return.  What it then guesses is compared with what it guesses unchanged, in the same text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.model_files import load_tokenizer, resolve_model
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import NoiseRows
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.sampling.sampling import SEED, TokenizerEncoder
from treeswarm_bench.benchmarks.sampling.tree_model import CachedModel
from treeswarm_bench.benchmarks.texts import held_out_prompts, repeated_4grams
from treeswarm_client.provenance import machine_provenance

PROMPT, RETURNED, ROUND = 40, 8, 6
"""Tokens of a prompt, best tokens that the tail returns per row, and tokens of a round."""
CHILDREN, DEPTH = 4, 8
"""The tree whose tokens per traversal are counted: so many children per node, and so many levels."""
QUARTERS = 4
TEMPERATURE = 1.0


@dataclass(frozen=True)
class GrownText:
    """A text of the target, and what target and draft computed at each of its places."""

    tokens: NDArray[np.int64]
    """The target's tokens, int64 [places]."""
    states: torch.Tensor
    """The draft's last hidden states, float32 [places, hidden]."""
    target_logits: torch.Tensor
    """float32 [places, vocab]."""
    noise: torch.Tensor
    """The noise with which the target chose, float32 [places, vocab]."""


@dataclass(eq=False)
class Correction:
    """A trained addition to the draft's logits: of full rank, or of a low one."""

    states_to: torch.nn.Linear
    rank: int | None
    learning_rate: float

    def __post_init__(self) -> None:
        hidden, vocab = self.states_to.in_features, self.states_to.out_features
        if self.rank is None:
            self.weights = [torch.zeros(hidden, vocab, requires_grad=True)]
        else:
            torch.manual_seed(0)
            down = (torch.randn(hidden, self.rank) / hidden**0.5).requires_grad_()
            self.weights = [down, torch.zeros(self.rank, vocab, requires_grad=True)]
        self.optimizer = torch.optim.Adam(self.weights, lr=self.learning_rate)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the corrected logits, float32 [n, vocab]."""
        added = states
        for weight in self.weights:
            added = added @ weight
        unchanged: torch.Tensor = self.states_to(states)
        return unchanged.detach() + added

    def learn(self, states: torch.Tensor, target_logits: torch.Tensor) -> None:
        """Take one step towards the target's best tokens after some rows."""
        best = target_logits.topk(RETURNED)
        shares = torch.softmax(best.values / TEMPERATURE, -1)
        logprobs = torch.log_softmax(self.logits(states) / TEMPERATURE, -1).gather(1, best.indices)
        loss = -(shares * logprobs).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


MakeCorrection = Callable[[torch.nn.Linear], Correction | None]
LEARNERS: Mapping[str, MakeCorrection] = {
    "unchanged": lambda _: None,
    "output layer, 1e-4": lambda head: Correction(head, None, 1e-4),
    "output layer, 1e-3": lambda head: Correction(head, None, 1e-3),
    "rank 16, 1e-3": lambda head: Correction(head, 16, 1e-3),
    "rank 16, 1e-2": lambda head: Correction(head, 16, 1e-2),
}


async def bench_online(setup: BenchSetup) -> dict[str, Any]:
    """Return hit rates and tokens per traversal by learner and quarter of the texts; each begins anew in every text."""
    folder, draft = resolve_model(setup.model), CachedModel.load(resolve_model(setup.draft))
    target = CachedModel.load(folder)
    prompts = held_out_prompts(TokenizerEncoder(load_tokenizer(folder)), setup.prompts)
    texts = [grow(target, draft, prompt[:PROMPT], setup.tokens, sample) for sample, prompt in enumerate(prompts)]
    head = draft.model.get_output_embeddings()
    rows = []
    for name, make in LEARNERS.items():
        hits = [follow(text, head, make(head)) for text in texts]
        rows.append({"learner": name, "quarters": [_figures(hits, quarter) for quarter in range(QUARTERS)]})
    return {
        "bench": "online",
        "rows": rows,
        "repeated_4grams": float(np.mean([repeated_4grams(text.tokens.tolist()) for text in texts])),
        "provenance": machine_provenance() | {"model": setup.model, "draft": setup.draft, "dtype": "float32"},
    }


@torch.inference_mode()
def grow(target: CachedModel, draft: CachedModel, prompt: Sequence[int], tokens: int, sample: int) -> GrownText:
    """Let the target continue a prompt, and the draft read what it wrote."""
    settings = SamplingSettings(temperature=TEMPERATURE, seed=SEED, sample=sample)
    text, logits, noises = list(prompt), [], []
    target.begin(text[:-1])
    made = NoiseRows(int(target.model.config.vocab_size))
    for _ in range(tokens):
        row = target.below([-1], [text[-1]])[0]
        target.advance([0])
        noise = torch.from_numpy(np.array(made.row(settings, len(text))))
        text.append(int((torch.log_softmax(row / TEMPERATURE, -1) + noise).argmax()))
        logits.append(row)
        noises.append(noise)
    states: list[torch.Tensor] = []
    hook = draft.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: states.append(given[0][0]))
    draft.begin(text[:-1])
    hook.remove()
    return GrownText(
        np.array(text[len(prompt) :]), torch.cat(states)[-tokens:].clone(), torch.stack(logits), torch.stack(noises)
    )


def follow(text: GrownText, head: torch.nn.Linear, correction: Correction | None) -> NDArray[np.int64]:
    """Return the rank of the target's token among the draft's guesses at each place, int64 [places].

    The draft learns from a round only after it has guessed the round's tokens.
    """
    ranks: list[int] = []
    for start in range(0, len(text.tokens), ROUND):
        part = slice(start, start + ROUND)
        states = text.states[part].clone()
        logits = (head(states) if correction is None else correction.logits(states)).detach()
        scores = torch.log_softmax(logits / TEMPERATURE, -1) + text.noise[part]
        chosen = scores.gather(1, torch.from_numpy(text.tokens[part])[:, None])
        ranks += (scores > chosen).sum(1).tolist()
        if correction is not None:
            correction.learn(states, text.target_logits[part].clone())
    return np.array(ranks)


def _figures(ranks: Sequence[NDArray[np.int64]], quarter: int) -> dict[str, float]:
    parts = [np.array_split(each, QUARTERS)[quarter] for each in ranks]
    traversals = sum(_traversals(part < CHILDREN) for part in parts)
    return {
        "first_guess": float(np.mean([(part == 0).mean() for part in parts])),
        f"best_{CHILDREN}": float(np.mean([(part < CHILDREN).mean() for part in parts])),
        "tokens_per_traversal": sum(map(len, parts)) / traversals,
    }


def _traversals(hits: NDArray[np.bool_]) -> int:
    """Return how many traversals a stretch takes if each follows hits for at most DEPTH levels, and buys one more."""
    traversals = place = 0
    while place < len(hits):
        followed = 0
        while followed < DEPTH and place + followed < len(hits) and hits[place + followed]:
            followed += 1
        place += followed + 1
        traversals += 1
    return traversals
