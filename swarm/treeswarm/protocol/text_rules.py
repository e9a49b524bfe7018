"""Rules: what changes a model's logits depending on the text so far, before a token is chosen.

A session's rules travel once, to its tail, and never change: penalties, biases, bans, further filters and a grammar.
They hold for every path of a tree alike, so a text under rules does not depend on the trees that were drafted.
"""

import json
import math
from dataclasses import astuple, dataclass
from hashlib import blake2b
from typing import Literal, get_args

from treeswarm.errors import BadRequest

# Version of the rules that this release applies as a tail, as its record says; 0 is a release without them.
RULES_VERSION = 1
DIGEST_BYTES = 16
# Limits of one request; each bounds the memory and time that a stranger's request takes at a tail.
MAX_BIASES = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 8192
MAX_END_TOKENS = 256
# Each token of a text is remembered with as many before it.
MAX_NGRAM = 64
MAX_GRAMMAR_BYTES = 1 << 16
MAX_BIAS = 1e4
MAX_REPETITION_PENALTY = 100.0
# OpenAI's and vLLM's range of both penalties.
MAX_PENALTY = 2.0
MAX_MIN_TOKENS = 1 << 22
TOKEN_LIMIT = 2**32

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Grammar:
    """A grammar that the generated text follows.  Raises BadRequest for an unknown kind or a text that is too long."""

    kind: GrammarKind
    text: str = ""
    """The schema, the pattern, a JSON list of choices, or the grammar; empty for `json_object`."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise BadRequest(f"unknown kind of grammar '{self.kind}': give one of {', '.join(get_args(GrammarKind))}")
        if (size := len(self.text.encode(errors="replace"))) > MAX_GRAMMAR_BYTES:
            raise BadRequest(f"a grammar of {size} bytes is too large: at most {MAX_GRAMMAR_BYTES} are taken")


@dataclass(frozen=True)
class TextRules:
    """What is done to logits before a token is chosen; the defaults change nothing.

    They apply in this order: biases, repetition penalty, presence and frequency penalty, repeated n-grams, bad words,
    least length, grammar; then temperature, top-k and top-p of the sampling settings; then min-p and typical-p.  Names
    and meaning are those of Hugging Face, and of OpenAI and vLLM where Hugging Face has none.  Raises BadRequest for a
    value outside its range.
    """

    repetition_penalty: float = 1.0
    """Divisor of positive logits, and factor of negative ones, of all tokens of prompt and output; 1 is off."""
    presence_penalty: float = 0.0
    """Amount subtracted from the logit of every token of the output, −2 to 2."""
    frequency_penalty: float = 0.0
    """Amount subtracted from a token's logit for each time that the output has it, −2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""
    min_p: float = 0.0
    """Least probability of a token that is kept, as a share of the likeliest token's; 0 is off."""
    typical_p: float = 1.0
    """Probability that the most typical tokens kept have together; 1 is off."""
    no_repeat_ngram_size: int = 0
    """Number of tokens of the n-grams that occur at most once in prompt and output; 0 is off."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are never generated: each one's last token is banned after the others."""
    min_tokens: int = 0
    """Number of output tokens before which no end token is chosen."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end the text: `min_tokens` bans them, and a grammar allows them where its text is complete."""
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        # Equal rules must have equal digests at both ends, whatever types of numbers a caller gave.
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_p", "typical_p"):
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)
        object.__setattr__(
            self, "logit_bias", tuple((int(token), float(bias) + 0.0) for token, bias in self.logit_bias)
        )
        object.__setattr__(self, "bad_words", tuple(tuple(map(int, word)) for word in self.bad_words))
        object.__setattr__(self, "end_tokens", tuple(map(int, self.end_tokens)))
        self._check_numbers()
        self._check_lists()

    @property
    def neutral(self) -> bool:
        """True if no rule changes anything, so that any tail generates the same text."""
        return self == TextRules(end_tokens=self.end_tokens)

    @property
    def banning(self) -> bool:
        """True if some rule can forbid a token outright."""
        return bool(self.no_repeat_ngram_size or self.bad_words or self.min_tokens or self.grammar)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise BadRequest if a rule names a token outside a vocabulary of this size."""
        named = (
            ("logit_bias", [token for token, _ in self.logit_bias]),
            ("bad_words", [token for word in self.bad_words for token in word]),
            ("end_tokens", self.end_tokens),
        )
        for name, tokens in named:
            if (largest := max(tokens, default=0)) >= vocab_size:
                raise BadRequest(f"{name} names token {largest}, but the vocabulary has {vocab_size} tokens")

    def _check_numbers(self) -> None:
        bounds = (
            ("repetition_penalty", self.repetition_penalty, 1.0 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
            ("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
            ("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
            ("min_p", self.min_p, 0.0, 1.0),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_NGRAM),
            ("min_tokens", self.min_tokens, 0, MAX_MIN_TOKENS),
        )
        for name, value, least, most in bounds:
            if not (math.isfinite(value) and least <= value <= most):
                raise BadRequest(f"{name} {value} is out of range: give {least} to {most}")
        if not 0.0 < self.typical_p <= 1.0:
            raise BadRequest(f"typical_p {self.typical_p} is out of range: give more than 0, up to 1 (off)")

    def _check_lists(self) -> None:
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise BadRequest("logit_bias names a token twice: give one bias per token")
        if worst := [bias for _, bias in self.logit_bias if not abs(bias) <= MAX_BIAS]:
            raise BadRequest(f"a logit_bias of {worst[0]} is out of range: give {-MAX_BIAS} to {MAX_BIAS}")
        if not all(self.bad_words):
            raise BadRequest("a bad word is empty: leave it out")
        tokens = [token for word in self.bad_words for token in word]
        for name, count, most in (
            ("biases", len(self.logit_bias), MAX_BIASES),
            ("bad words", len(self.bad_words), MAX_BAD_WORDS),
            ("tokens of bad words", len(tokens), MAX_BAD_WORD_TOKENS),
            ("end tokens", len(self.end_tokens), MAX_END_TOKENS),
        ):
            if count > most:
                raise BadRequest(f"{count} {name} are too many: at most {most} are taken")
        if any(not 0 <= token < TOKEN_LIMIT for token in (*tokens, *self.end_tokens, *(t for t, _ in self.logit_bias))):
            raise BadRequest("a rule names a token id that is negative or over 32 bits")


@dataclass(frozen=True)
class RulesRequest:
    """Rules, and the number of tokens of the text they hold for that were given rather than generated."""

    rules: TextRules
    prompt_length: int

    @property
    def digest(self) -> bytes:
        """DIGEST_BYTES bytes over everything that was understood, by which a tail confirms what it applies.

        A tail of another release, which knows fewer rules, gets another digest.
        """
        text = json.dumps([astuple(self.rules), self.prompt_length], separators=(",", ":"))
        return blake2b(text.encode(errors="replace"), digest_size=DIGEST_BYTES).digest()
