"""Converts the rules of a request to protobuf and back, and checks them."""

from typing import cast

import numpy as np

from treeswarm.errors import Malformed
from treeswarm.protocol.text_rules import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_END_TOKENS,
    MAX_MIN_TOKENS,
    Grammar,
    GrammarKind,
    RulesRequest,
    TextRules,
)
from treeswarm.wire import treeswarm_pb2 as pb


def rules_out(request: RulesRequest) -> pb.RulesRequest:
    """Return the request as protobuf."""
    rules = request.rules
    return pb.RulesRequest(
        prompt_length=request.prompt_length,
        repetition_penalty=rules.repetition_penalty,
        presence_penalty=rules.presence_penalty,
        frequency_penalty=rules.frequency_penalty,
        bias_tokens=_tokens_out([token for token, _ in rules.logit_bias]),
        biases=[bias for _, bias in rules.logit_bias],
        min_p=rules.min_p,
        typical_p=rules.typical_p,
        no_repeat_ngram_size=rules.no_repeat_ngram_size,
        bad_word_lengths=_tokens_out([len(word) for word in rules.bad_words]),
        bad_word_tokens=_tokens_out([token for word in rules.bad_words for token in word]),
        min_tokens=rules.min_tokens,
        end_tokens=_tokens_out(rules.end_tokens),
        grammar_kind="" if rules.grammar is None else rules.grammar.kind,
        grammar="" if rules.grammar is None else rules.grammar.text,
    )


def rules_in(message: pb.RulesRequest) -> RulesRequest:
    """Return the request.  Raises Malformed, and BadRequest for rules outside their limits."""
    if message.prompt_length > MAX_MIN_TOKENS:
        raise Malformed(f"rules.prompt_length: {message.prompt_length} tokens, at most {MAX_MIN_TOKENS}")
    bias_tokens = _tokens_in(message.bias_tokens, "bias_tokens", MAX_BIASES)
    if len(bias_tokens) != len(message.biases):
        raise Malformed(f"rules.biases: {len(message.biases)} biases for {len(bias_tokens)} tokens")
    rules = TextRules(
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(zip(bias_tokens, message.biases, strict=True)),
        min_p=message.min_p,
        typical_p=message.typical_p,
        no_repeat_ngram_size=message.no_repeat_ngram_size,
        bad_words=_words_in(message),
        min_tokens=message.min_tokens,
        end_tokens=tuple(_tokens_in(message.end_tokens, "end_tokens", MAX_END_TOKENS)),
        # The grammar itself refuses a kind that is unknown.
        grammar=Grammar(cast(GrammarKind, message.grammar_kind), message.grammar) if message.grammar_kind else None,
    )
    return RulesRequest(rules, message.prompt_length)


def _words_in(message: pb.RulesRequest) -> tuple[tuple[int, ...], ...]:
    lengths = _tokens_in(message.bad_word_lengths, "bad_word_lengths", MAX_BAD_WORDS)
    tokens = _tokens_in(message.bad_word_tokens, "bad_word_tokens", MAX_BAD_WORD_TOKENS)
    if sum(lengths) != len(tokens):
        raise Malformed(f"rules.bad_word_tokens: {len(tokens)} tokens for bad words of {sum(lengths)}")
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    return tuple(tuple(tokens[end - length : end]) for length, end in zip(lengths, ends, strict=True))


def _tokens_out(tokens: list[int] | tuple[int, ...]) -> bytes:
    return np.array(tokens, "<u4").tobytes()


def _tokens_in(data: bytes, field: str, limit: int) -> list[int]:
    if len(data) % 4 or len(data) > 4 * limit:
        raise Malformed(f"rules.{field}: {len(data)} bytes are not at most {limit} elements of 4 bytes")
    return [int(value) for value in np.frombuffer(data, "<u4")]
