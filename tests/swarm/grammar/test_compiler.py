"""What grammars are taken, and what is said of the others."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.grammar_tokenizers import END, byte_level, compiler_for, sentence_piece

from treeswarm.errors import BadRequest
from treeswarm.grammar.compiler import GrammarCompiler
from treeswarm.grammar.library import grammar_class
from treeswarm.protocol.text_rules import Grammar


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return compiler_for(byte_level())


def begin(compiler: GrammarCompiler, grammar: Grammar) -> str:
    """Return the first tokens that are forced, as text."""
    masks = compiler.begin(grammar, [byte_level().token_to_id(END)])
    return byte_level().decode(masks.forced_run([], 30), skip_special_tokens=True)


@pytest.mark.parametrize(
    ("grammar", "forced"),
    [
        (Grammar("json_object"), ""),
        (Grammar("json_schema", '{"const": {"a": [1, "é"]}}'), '{"a": [1, "é"]}'),
        (Grammar("json_schema", "true"), ""),
        (Grammar("regex", r'a/"\\b'), 'a/"\\b'),
        (Grammar("choice", json.dumps(['say "hi"\n\\ é😀'])), 'say "hi"\n\\ é😀'),
        (Grammar("lark", 'start: "cat" rest\nrest: "s"'), "cats"),
    ],
)
def test_every_kind_is_compiled(compiler: GrammarCompiler, grammar: Grammar, forced: str) -> None:
    assert begin(compiler, grammar) == forced


def test_a_schema_may_choose_its_own_white_space(compiler: GrammarCompiler) -> None:
    schema = {"const": {"a": 1}, "x-guidance": {"item_separator": ",", "key_separator": ":"}}
    assert begin(compiler, Grammar("json_schema", json.dumps(schema))) == '{"a":1}'


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("json_schema", "{"), "the JSON schema is no JSON"),
        (Grammar("json_schema", "[" * 30_000), "the JSON schema is no JSON"),
        (Grammar("json_schema", "[1]"), r"the JSON schema is \[1\]: give an object"),
        (Grammar("json_schema", "false"), "the JSON schema is false: give an object"),
        (Grammar("json_schema", '{"type": "nope"}'), "Invalid type: nope"),
        (Grammar("json_schema", '{"not": {"type": "string"}}'), r'Unimplemented keys: \["not"\]'),
        (Grammar("json_schema", '{"$ref": "http://example.org/x"}'), "does not fetch"),
        (Grammar("json_schema", '{"x-guidance": 3}'), "x-guidance of the JSON schema is no object"),
        (Grammar("json_schema", '{"multipleOf": 1000003}'), "1e.06 remainders, at most 100000"),
        (Grammar("json_schema", '{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}'), "remainders"),
        (Grammar("json_schema", '{"multipleOf": 1.000003}'), "remainders"),
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("choice", "[]"), "no list of strings"),
        (Grammar("choice", '"a"'), "no list of strings"),
        (Grammar("choice", "[1]"), "no list of strings"),
        (Grammar("choice", json.dumps([str(i) for i in range(5000)])), "5000 choices are too many"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("lark", 'start: %json {"multipleOf": 1000003}'), "needs 1e\\+06 remainders"),
        (Grammar("lark", 'start: "%json" a'), "not followed by a JSON schema"),
        (Grammar("lark", 'start: %json {"a": "%json"} | %json [1]'), "give an object"),
        (Grammar("lark", "start: %regex { }"), "%regex and %llguidance are not taken"),
        (Grammar("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "too deeply nested"),
    ],
)
def test_a_refusal_says_why(compiler: GrammarCompiler, grammar: Grammar, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        begin(compiler, grammar)


@pytest.mark.parametrize("multiples", [["7"], ["0.01", "0.1", "1"], ["5", "10", "100"]])
def test_usual_multiples_are_taken(compiler: GrammarCompiler, multiples: Sequence[str]) -> None:
    properties = {f"p{i}": {"type": "number", "multipleOf": float(each)} for i, each in enumerate(multiples)}
    assert begin(compiler, Grammar("json_schema", json.dumps({"properties": properties}))) == ""


def test_a_grammar_needs_a_token_that_ends_its_text(compiler: GrammarCompiler) -> None:
    with pytest.raises(BadRequest, match="leave out ignore_eos"):
        compiler.begin(Grammar("json_object"), [])


def test_a_grammar_that_grows_too_large_is_refused_and_forgotten(compiler: GrammarCompiler) -> None:
    grammar = Grammar("regex", "(((a{1,1000}){1,1000}){1,1000})")
    masks = compiler.begin(grammar, [byte_level().token_to_id(END)])
    assert grammar in compiler._compiled
    text = byte_level().encode("a" * 400).ids
    with pytest.raises(BadRequest, match="the grammar has become too large: "):
        for length in range(len(text)):
            masks.after(text[:length], [()])
    assert grammar not in compiler._compiled


def test_names_differ_with_tokenizer_and_vocabulary(tmp_path: Path) -> None:
    names = set()
    for name, tokenizer in (("a", byte_level()), ("b", sentence_piece())):
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        names |= {grammar_class(tmp_path / name, 500), grammar_class(tmp_path / name, 512)}
    assert len(names) == 4
    assert all(name.startswith("llguidance-") and len(name) < 40 for name in names)
    assert grammar_class(tmp_path / "a", 500) in names


def test_naming_the_library_does_not_import_it() -> None:
    code = "import sys, treeswarm.grammar.library as l; print(l.is_installed(), 'llguidance' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]
