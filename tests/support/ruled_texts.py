"""Texts of the toy model under rules, as stock transformers' processors give them, and a drafter that guesses them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tests.support.stock_rules import stock_token
from tests.support.toy_grammar import toy_allowed
from tests.support.toy_swarm import VOCAB, GuessingDrafter, context_logits

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import TextRules
from treeswarm_client.drafters.seam import Verification

KNOBS: dict[str, Any] = {
    "repetition_penalty": 2.5,
    "presence_penalty": 1.5,
    "frequency_penalty": 0.15,
    "logit_bias": ((2, 0.9), (4, -1.5)),
    "no_repeat_ngram_size": 3,
    "bad_words": ((3,), (1, 2), (0, 4, 0)),
    "min_tokens": 25,
    "min_p": 0.6,
    "typical_p": 0.7,
}
"""A value of every knob that changes the toy model's texts."""


@dataclass(eq=False)
class RuledModel:
    """The toy model under rules: plain decoding with stock transformers' processors."""

    rules: TextRules
    prompt_length: int
    settings: SamplingSettings = SamplingSettings()
    _known: dict[tuple[int, ...], int | None] = field(default_factory=dict)

    def token(self, context: Sequence[int]) -> int | None:
        """Return the token after a context, or None if the rules allow none."""
        key = tuple(context)
        if key not in self._known:
            logits = context_logits(context)
            if self.rules.grammar is not None:
                allowed = torch.zeros(VOCAB, dtype=torch.bool)
                allowed[toy_allowed(list(context[self.prompt_length :]), VOCAB)] = True
                logits = logits.masked_fill(~allowed, -torch.inf)
            self._known[key] = stock_token(context, logits, self.rules, self.prompt_length, self.settings)
        return self._known[key]

    def text(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the text after a prompt, up to `count` tokens and the first end token."""
        text = list(prompt)
        while len(text) < len(prompt) + count and (token := self.token(text)) is not None:
            text.append(token)
            if token in self.rules.end_tokens:
                break
        return text[len(prompt) :]


@dataclass
class RuledGuesser(GuessingDrafter):
    """Guesses the ruled model's own token by chance, and a random one otherwise."""

    model: RuledModel = field(kw_only=True)
    alternatives: int = 0

    def truth(self, path: Sequence[int]) -> int:
        token = self.model.token(path)
        return 0 if token is None else token

    def observe(self, verification: Verification) -> None:
        accepted = (int(verification.tree.tokens[i]) for i in verification.accepted)
        self._text += [*accepted, verification.bonus]


def random_rules(seed: int, count: int = 2) -> TextRules:
    """Return rules with `count` knobs turned, the same for every seed."""
    names = np.random.default_rng(seed).choice(sorted(KNOBS), count, replace=False)
    return TextRules(**{str(name): KNOBS[str(name)] for name in names}, end_tokens=(0,))
