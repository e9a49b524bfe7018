"""The toy model's tokens as letters, so that real grammars constrain its texts; and what plain decoding writes then."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import regex
import torch
from tests.support.stock_rules import stock_token
from tests.support.toy_swarm import VOCAB, context_logits
from tokenizers import Tokenizer

from treeswarm.grammar.compiler import GrammarCompiler
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import TextRules

END = 0
LETTERS = " abcd"
"""Letter of each token; the first one ends a text."""


def letters_compiler() -> GrammarCompiler:
    """Return the compiler of grammars for the toy model's tokens."""
    vocabulary = {"</s>": END} | {LETTERS[token]: token for token in range(1, VOCAB)}
    added = {
        "id": END, "content": "</s>", "special": True, "normalized": False,
        "single_word": False, "lstrip": False, "rstrip": False,
    }  # fmt: skip
    content = {
        "version": "1.0", "added_tokens": [added], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
        "trim_offsets": True, "use_regex": False}, "decoder": {"type": "ByteLevel", "add_prefix_space": False,
        "trim_offsets": True, "use_regex": False}, "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }  # fmt: skip
    return GrammarCompiler.of(Tokenizer.from_str(json.dumps(content)), VOCAB, "letters")


@dataclass(eq=False)
class LettersModel:
    """The toy model under a pattern: plain decoding, where another library says which letters may follow."""

    pattern: str
    rules: TextRules
    prompt_length: int
    settings: SamplingSettings = SamplingSettings()
    _known: dict[tuple[int, ...], int | None] = field(default_factory=dict)

    def allowed(self, generated: Sequence[int]) -> list[int]:
        """Return the tokens that may follow a generated text."""
        written = "".join(LETTERS[token] for token in generated)
        complete = [END] if regex.fullmatch(self.pattern, written) else []
        following = [t for t in range(1, VOCAB) if regex.fullmatch(self.pattern, written + LETTERS[t], partial=True)]
        return complete + following

    def token(self, context: Sequence[int]) -> int | None:
        """Return the token after a context, or None after the end of a text."""
        key = tuple(context)
        if key not in self._known:
            masked = torch.full((VOCAB,), -torch.inf)
            generated = context[self.prompt_length :]
            allowed = [] if END in generated else self.allowed(generated)
            masked[allowed] = context_logits(context)[allowed]
            self._known[key] = stock_token(context, masked, self.rules, self.prompt_length, self.settings)
        return self._known[key]

    def text(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the text after a prompt, up to `count` tokens and the end token."""
        text = list(prompt)
        while len(text) < len(prompt) + count and (token := self.token(text)) is not None:
            text.append(token)
            if token == END:
                break
        return text[len(prompt) :]
