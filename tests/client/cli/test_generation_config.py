"""`swarm generate` and `swarm chat` choose tokens as transformers does with the model's own generation config."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from treeswarm.errors import BadRequest
from treeswarm.model_sources.generation_config import GenerationDefaults
from treeswarm.protocol.text_rules import Grammar, TextRules
from treeswarm_client.cli.flags import add_sampling_flags, describe_defaults, sampling_of

# As Qwen2.5 publishes it, in part.
QWEN = GenerationDefaults(True, {"temperature": 0.7, "top_k": 20}, {"repetition_penalty": 1.05, "min_p": 0.1})


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser, max_new_tokens=5)
    return parser.parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "defaults", "expected", "rules"),
    [
        ((), GenerationDefaults(), {"temperature": 0.0}, TextRules()),
        ((), GenerationDefaults(settings={"temperature": 0.7}), {"temperature": 0.0}, TextRules()),
        ((), QWEN, {"temperature": 0.7, "top_k": 20}, TextRules(repetition_penalty=1.05, min_p=0.1)),
        ((), GenerationDefaults(True), {"temperature": 1.0, "top_k": 50}, TextRules()),
        (("--temperature", "0"), QWEN, {"temperature": 0.0, "top_k": 20}, TextRules(repetition_penalty=1.05)),
        (("--temperature", "0.2"), GenerationDefaults(True), {"temperature": 0.2}, TextRules()),
        (("--top-k", "3"), QWEN, {"temperature": 0.7, "top_k": 3}, TextRules(repetition_penalty=1.05, min_p=0.1)),
        (("--generation-config", "none"), QWEN, {"temperature": 0.0}, TextRules()),
        (("--repetition-penalty", "1.3", "--min-tokens", "4"), GenerationDefaults(), {"temperature": 0.0},
         TextRules(repetition_penalty=1.3, min_tokens=4)),
        (("--repetition-penalty", "1", "--temperature", "1", "--min-p", "0.3"), QWEN, {"temperature": 1.0, "top_k": 20},
         TextRules(min_p=0.3)),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_not_given_comes_from_the_model(
    flags: tuple[str, ...], defaults: GenerationDefaults, expected: dict[str, Any], rules: TextRules
) -> None:
    options = sampling_of(parse(*flags), defaults)
    assert options == {"max_new_tokens": 5, "seed": 0, "stop": [], "rules": rules, **expected}


def test_user_is_told_what_the_model_decides() -> None:
    told = describe_defaults(parse(), QWEN)
    assert told is not None
    assert "temperature 0.7, top_k 20, repetition_penalty 1.05, min_p 0.1 (--generation-config none" in told
    named = describe_defaults(parse("--repetition-penalty", "1.05"), QWEN)
    assert named is not None
    assert "repetition_penalty" not in named
    greedy = describe_defaults(parse("--temperature", "0"), QWEN)
    assert greedy is not None
    assert "greedy, repetition_penalty 1.05 (" in greedy
    assert describe_defaults(parse(), GenerationDefaults()) is None
    assert describe_defaults(parse("--generation-config", "none"), QWEN) is None
    assert describe_defaults(parse("--temperature", "1"), GenerationDefaults(True, {"top_k": 20})) is None


def test_form_of_the_text_is_named_by_one_flag(tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text('{"type": "object"}')
    grammar.write_text('root ::= "a"')
    for flags, expected in (
        (("--json-schema", str(schema)), Grammar("json_schema", '{"type": "object"}')),
        (("--json-object",), Grammar("json_object")),
        (("--regex", "a+"), Grammar("regex", "a+")),
        (("--choice", "a", "--choice", "é"), Grammar("choice", '["a", "\\u00e9"]')),
        (("--grammar", str(grammar)), Grammar("lark", 'start: "a"\n')),
    ):
        found = sampling_of(parse(*flags), GenerationDefaults())["rules"].grammar
        assert found is not None
        assert (found.kind, found.text.strip()) == (expected.kind, expected.text.strip())
    with pytest.raises(SystemExit):
        parse("--regex", "a", "--json-object")
    with pytest.raises(BadRequest, match=r"missing\.json cannot be read"):
        sampling_of(parse("--json-schema", str(tmp_path / "missing.json")), GenerationDefaults())
