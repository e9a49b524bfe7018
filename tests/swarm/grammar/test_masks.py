"""Masks after every path of a tree: what they allow, against other ways to know it."""

import json
import random
from collections.abc import Callable, Sequence

import jsonschema
import numpy as np
import pytest
import regex
from tests.support.grammar_tokenizers import END, TOKENIZERS, compiler_for
from tokenizers import Tokenizer

from treeswarm.errors import BadRequest
from treeswarm.grammar.bits import allowed_tokens, has_token, mask_words, only_token
from treeswarm.grammar.compiler import GrammarCompiler
from treeswarm.grammar.masks import TextMasks
from treeswarm.protocol.text_rules import Grammar, RulesRequest, TextRules
from treeswarm.session.paths import RowPaths

PATTERNS = [r"[a-c]{1,3}", r"(cat|car|cart) ?(7|77)", r'"(é|😀|[a-z ])*"', r"(ab|a(bc)*)d?", r"-?[0-9]{1,2}\.[0-9]"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue", "é"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PADDING = 45


class Case:
    """A tokenizer, its compiler, and the bytes of its tokens."""

    def __init__(self, make: Callable[[], Tokenizer]) -> None:
        self.tokenizer = make()
        self.end = self.tokenizer.token_to_id(END)
        self.compiler: GrammarCompiler = compiler_for(make(), PADDING)

    def begin(self, grammar: Grammar) -> TextMasks:
        return self.compiler.begin(grammar, [self.end])

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.bytes_of_token(token) for token in tokens)

    def bytes_of_token(self, token: int) -> bytes:
        piece = self.tokenizer.id_to_token(token)
        if self.tokenizer.get_vocab().get("<0x0A>") is None:
            return bytes(BYTE_OF[character] for character in piece)
        if regex.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def walk(self, masks: TextMasks, choose: random.Random, most: int = 60) -> list[int]:
        """Return a text of tokens chosen at random among those allowed, up to its end."""
        text: list[int] = []
        while len(text) < most and self.end not in text:
            text.append(choose.choice(allowed_tokens(masks.after(text, [()])[0]).tolist()))
        return text


def _bytes_of_characters() -> dict[str, int]:
    """Return the bytes that the characters of byte-level tokens stand for (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(TOKENIZERS[request.param])


def can_begin(pattern: str, text: bytes) -> bool:
    """Return whether some text of the pattern begins so; unfinished characters count as any they may become."""
    for cut in range(min(4, len(text) + 1)):
        try:
            start = text[: len(text) - cut].decode()
        except UnicodeDecodeError:
            continue
        if not cut:
            return regex.fullmatch(pattern, start, partial=True) is not None
        ends = (character for character in "é😀" if character.encode().startswith(text[len(text) - cut :]))
        return any(regex.fullmatch(pattern, start + character, partial=True) for character in ends)
    return False


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_allow_what_the_pattern_allows(case: Case, pattern: str) -> None:
    masks, choose = case.begin(Grammar("regex", pattern)), random.Random(3)
    tokens = [token for token in range(case.tokenizer.get_vocab_size()) if token not in case.compiler._added]
    for _ in range(2):
        text = case.walk(masks, choose, 6)
        for length in range(len(text)):
            written = case.bytes_of(text[:length])
            mask = masks.after(text[:length], [()])[0]
            allowed = {token for token in allowed_tokens(mask).tolist() if token != case.end}
            possible = {t for t in tokens if can_begin(pattern, written + case.bytes_of_token(t))}
            next_bytes = {case.bytes_of_token(token)[0] for token in possible}
            assert allowed <= possible
            # Where only one byte can follow, the library allows the usual spelling of what is forced and no other.
            assert allowed == possible or (len(next_bytes) == 1 and allowed)
            is_complete = can_begin(pattern, written) and bool(
                regex.fullmatch(pattern, written.decode(errors="replace"))
            )
            assert has_token(mask, case.end) == is_complete


@pytest.mark.parametrize("pattern", PATTERNS)
def test_finished_texts_match_their_pattern(case: Case, pattern: str) -> None:
    masks, choose = case.begin(Grammar("regex", pattern)), random.Random(4)
    for _ in range(10):
        text = case.walk(masks, choose)
        if text[-1] == case.end:
            assert regex.fullmatch(pattern, case.bytes_of(text[:-1]).decode())


def test_finished_texts_are_valid_json(case: Case) -> None:
    masks, choose = case.begin(Grammar("json_schema", json.dumps(SCHEMA))), random.Random(5)
    finished = 0
    for _ in range(12):
        text = case.walk(masks, choose, 90)
        if text[-1] == case.end:
            jsonschema.validate(json.loads(case.bytes_of(text[:-1])), SCHEMA)
            finished += 1
    assert finished >= 3


def test_masks_of_a_tree_are_those_of_its_paths_alone(case: Case) -> None:
    grammar, choose = Grammar("json_schema", json.dumps(SCHEMA)), random.Random(6)
    masks = case.begin(grammar)
    trunk = case.walk(masks, choose, 7)
    for _ in range(4):
        branches: list[tuple[int, ...]] = [()]
        while len(branches) < 12:
            parent = choose.choice(branches)
            allowed = allowed_tokens(masks.after(trunk, [parent])[0]).tolist()
            follows = allowed and choose.random() < 0.8
            token = choose.choice(allowed) if follows else choose.randrange(case.compiler.vocab_size)
            branches.append((*parent, token))
        choose.shuffle(branches)
        found = masks.after(trunk, branches)
        for branch, mask in zip(branches, found, strict=True):
            alone = case.begin(grammar).after(trunk, [branch])[0]
            np.testing.assert_array_equal(mask, alone)
        trunk = (
            [*trunk, *branches[0][:1]]
            if masks.follows(trunk, branches[0][:1]) and case.end not in branches[0]
            else trunk
        )


def test_paths_of_a_tail_are_read_from_the_prompts_end(case: Case) -> None:
    """A prompt may come in parts, and the rows of its last one begin before its end."""
    request = RulesRequest(TextRules(grammar=Grammar("choice", '["cat", "car"]'), end_tokens=(case.end,)), 3)
    text, alone = case.begin(Grammar("choice", '["cat", "car"]')).forced_run([], 9), case.begin(request.rules.grammar)
    parents, tokens = np.arange(-1, len(text)), np.array([7, *text])
    for paths, expected in (
        (RowPaths([5, 6, 7], 2, parents[:1], tokens[:1], np.array([0])), [()]),
        (RowPaths([5, 6, 7], 2, parents, tokens, np.array([0, len(text)])), [(), text]),
        (RowPaths([5, 6, 7, *text], 3 + len(text), parents, tokens, np.array([-1])), [text]),
    ):
        found = case.compiler.open(request).allowed(paths)
        np.testing.assert_array_equal(found, alone.after([], expected))


def test_padding_and_other_special_tokens_are_never_allowed(case: Case) -> None:
    masks = case.begin(Grammar("regex", r"(?s:.*)"))
    mask = masks.after([], [()])
    assert mask.shape == (1, mask_words(case.compiler.vocab_size))
    allowed = allowed_tokens(mask[0])
    assert allowed.max() < case.tokenizer.get_vocab_size()
    assert set(allowed.tolist()) & case.compiler._added == {case.end}


def test_any_token_of_the_request_may_end_the_text(case: Case) -> None:
    other = next(iter(case.compiler._added - {case.end}), case.end)
    masks = case.compiler.begin(Grammar("choice", '["a"]'), [case.end, other])
    start = masks.after([], [()])[0]
    assert not has_token(start, case.end)
    assert not has_token(start, other)
    text = [allowed_tokens(start)[0]]
    assert set(allowed_tokens(masks.after(text, [()])[0]).tolist()) == {case.end, other}
    assert masks.follows(text, [other]) == 1


def test_forced_tokens_are_the_only_ones_allowed(case: Case) -> None:
    masks = case.begin(Grammar("json_schema", json.dumps(SCHEMA)))
    run = masks.forced_run([], 20)
    assert case.bytes_of(run).startswith(b'{"name":')
    for length, token in enumerate(run):
        assert only_token(masks.after(run[:length], [()])[0]) == token
    assert only_token(masks.after(run, [()])[0]) is None
    assert masks.forced_run([], 2) == run[:2]


def test_a_forced_end_ends_the_run(case: Case) -> None:
    masks = case.begin(Grammar("choice", '["cat"]'))
    run = masks.forced_run([], 20)
    assert run[-1] == case.end
    assert case.bytes_of(run[:-1]) == b"cat"
    assert masks.follows([], run) == len(run)
    assert not masks.after(run, [(), run[:1]]).any()


def test_branches_outside_the_grammar_allow_nothing(case: Case) -> None:
    masks = case.begin(Grammar("choice", '["cat"]'))
    wrong = case.tokenizer.token_to_id("}")
    text = masks.forced_run([], 20)
    found = masks.after([], [[wrong], [wrong, wrong], text, [*text, wrong], [case.compiler.vocab_size - 1], text[:1]])
    assert not found[:5].any()
    assert found[5].any()


def test_a_text_outside_its_grammar_is_refused(case: Case) -> None:
    masks = case.begin(Grammar("choice", '["cat"]'))
    with pytest.raises(BadRequest, match="does not follow its grammar"):
        masks.after([case.tokenizer.token_to_id("}")], [()])
    assert masks.after([], [()]).any()


def test_a_slow_grammar_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = case.begin(Grammar("choice", '["cat"]'))
    now = iter([0.0, 1.0, 1.0, 5.0])
    monkeypatch.setattr("treeswarm.grammar.masks.thread_time", lambda: next(now))
    masks.after([], [()])
    with pytest.raises(BadRequest, match="too slow: its masks took 2500 ms per token"):
        masks.after([], [()])
