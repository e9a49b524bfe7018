"""Rules: values outside their limits are refused by name, and equal rules have equal digests at both ends."""

from dataclasses import replace
from typing import Any

import pytest

from treeswarm.errors import BadRequest
from treeswarm.protocol.text_rules import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_END_TOKENS,
    MAX_GRAMMAR_BYTES,
    Grammar,
    RulesRequest,
    TextRules,
)

FULL = TextRules(
    repetition_penalty=1.3,
    presence_penalty=0.5,
    frequency_penalty=-0.25,
    logit_bias=((3, 1.5), (7, -100.0)),
    min_p=0.1,
    typical_p=0.9,
    no_repeat_ngram_size=3,
    bad_words=((4,), (5, 6)),
    min_tokens=9,
    end_tokens=(0, 2),
    grammar=Grammar("regex", "[a-z]+"),
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is out of range"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty inf"),
        ({"presence_penalty": 2.5}, "presence_penalty 2.5 is out of range: give -2.0 to 2.0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"typical_p": 0.0}, "typical_p 0.0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size -1"),
        ({"min_tokens": -1}, "min_tokens -1"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "names a token twice"),
        ({"logit_bias": ((1, float("inf")),)}, "a logit_bias of inf"),
        ({"logit_bias": tuple((i, 0.0) for i in range(MAX_BIASES + 1))}, f"{MAX_BIASES + 1} biases are too many"),
        ({"bad_words": ((),)}, "a bad word is empty"),
        ({"bad_words": ((1,),) * (MAX_BAD_WORDS + 1)}, "bad words are too many"),
        ({"bad_words": ((1,) * (MAX_BAD_WORD_TOKENS + 1),)}, "tokens of bad words are too many"),
        ({"bad_words": ((-1,),)}, "negative or over 32 bits"),
        ({"end_tokens": (1,) * (MAX_END_TOKENS + 1)}, "end tokens are too many"),
        ({"end_tokens": (2**32,)}, "negative or over 32 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_rules_outside_their_limits_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        TextRules(**changes)


def test_a_grammar_has_a_known_kind_and_a_bounded_size() -> None:
    with pytest.raises(BadRequest, match="unknown kind of grammar 'xml'"):
        Grammar("xml", "")  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="a grammar of 65537 bytes"):
        Grammar("lark", "x" * (MAX_GRAMMAR_BYTES + 1))


def test_only_the_defaults_are_neutral() -> None:
    assert TextRules().neutral
    assert TextRules(end_tokens=(1,)).neutral
    for name, default in vars(TextRules()).items():
        if name != "end_tokens":
            assert not replace(TextRules(), **{name: getattr(FULL, name)}).neutral, name
            assert getattr(FULL, name) != default


def test_tokens_outside_the_vocabulary_are_refused_by_name() -> None:
    FULL.check_vocabulary(8)
    with pytest.raises(BadRequest, match="logit_bias names token 7, but the vocabulary has 7"):
        FULL.check_vocabulary(7)
    with pytest.raises(BadRequest, match="bad_words names token 6"):
        replace(FULL, logit_bias=()).check_vocabulary(6)


def test_digest_covers_every_rule_and_the_prompt() -> None:
    digests = {RulesRequest(FULL, 5).digest, RulesRequest(FULL, 6).digest}
    digests |= {RulesRequest(replace(FULL, **{name: getattr(TextRules(), name)}), 5).digest for name in vars(FULL)}
    assert len(digests) == 2 + len(vars(FULL))
    assert {len(digest) for digest in digests} == {16}


def test_whole_numbers_have_the_digest_of_equal_fractions() -> None:
    whole = TextRules(repetition_penalty=2, presence_penalty=-0.0, logit_bias=[(1, 5)])  # type: ignore[arg-type]
    fractions = TextRules(repetition_penalty=2.0, presence_penalty=0.0, logit_bias=((1, 5.0),))
    assert RulesRequest(whole, 1).digest == RulesRequest(fractions, 1).digest
