"""Structured output as the programs of every API ask for it."""

import json
from typing import Any

import pytest

from treeswarm.protocol.text_rules import Grammar
from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.generation_request import ParameterError
from treeswarm_client.gateway.openai.requests import parse_chat_request
from treeswarm_client.gateway.parameters.grammars import grammar_of
from treeswarm_client.gateway.parameters.parameter import Api
from treeswarm_client.gateway.parameters.table import read_request

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)
BODY = {
    Api.CHAT: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    Api.COMPLETIONS: {"model": "m", "prompt": "x"},
    Api.RESPONSES: {"model": "m", "input": "x"},
    Api.MESSAGES: {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9},
}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
FLAT = {"type": "json_schema", "name": "n", "schema": SCHEMA}


def grammar(api: Api, **given: Any) -> Grammar | None:
    return grammar_of(read_request({**BODY[api], **given}, api))


@pytest.mark.parametrize(
    ("api", "given", "expected"),
    [
        (Api.CHAT, {}, None),
        (Api.CHAT, {"response_format": {"type": "text"}}, None),
        (Api.CHAT, {"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (Api.CHAT, {"response_format": NAMED}, Grammar("json_schema", TEXT)),
        (Api.COMPLETIONS, {"response_format": NAMED}, Grammar("json_schema", TEXT)),
        (Api.CHAT, {"structured_outputs": {}}, None),
        (
            Api.CHAT,
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}},
            Grammar("json_schema", TEXT),
        ),
        (Api.CHAT, {"structured_outputs": {"json": TEXT}}, Grammar("json_schema", TEXT)),
        (Api.CHAT, {"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        (Api.CHAT, {"structured_outputs": {"choice": ["a", "é"]}}, Grammar("choice", '["a", "\\u00e9"]')),
        (Api.CHAT, {"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        (Api.CHAT, {"guided_json": SCHEMA}, Grammar("json_schema", TEXT)),
        (Api.COMPLETIONS, {"guided_regex": "a+"}, Grammar("regex", "a+")),
        (Api.COMPLETIONS, {"guided_choice": ["a"]}, Grammar("choice", '["a"]')),
        (Api.CHAT, {"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        (Api.RESPONSES, {"text": {"format": FLAT}}, Grammar("json_schema", TEXT)),
        (Api.RESPONSES, {"text": {"format": {"type": "text"}, "verbosity": "medium"}}, None),
        (Api.MESSAGES, {"output_config": {"format": FLAT}}, Grammar("json_schema", TEXT)),
        (Api.MESSAGES, {"output_format": FLAT}, Grammar("json_schema", TEXT)),
    ],
)
def test_every_form_becomes_a_grammar(api: Api, given: dict[str, Any], expected: Grammar | None) -> None:
    assert grammar(api, **given) == expected


def test_llama_cpps_notation_is_written_as_lark() -> None:
    found = grammar(Api.CHAT, structured_outputs={"grammar": 'root ::= "yes" | num\nnum ::= [0-9]+'})
    assert found is not None
    assert found.kind == "lark"
    assert found.text.startswith("start:")
    assert "%llguidance" not in found.text


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", 'type is "xml": give "text", "json_object"'),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is null: give an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "schema is missing"),
        ({"response_format": "json"}, "response_format", "give an object"),
        ({"response_format": NAMED, "guided_regex": "a"}, "guided_regex", "both say how the text is formed"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "has 2 grammars: give one"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs", "cannot be honoured"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs", "cannot be honoured"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "give a list of texts"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs", r"choice\[0\] is 1: give a text"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs", "regex is 3: give a text"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs", "lone surrogates"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs", "70000 bytes is too large"),
        ({"guided_json": 3}, "guided_json", "give a JSON schema"),
        ({"guided_grammar": 'root ::= ( "a"'}, "guided_grammar", "neither Lark nor GBNF"),
    ],
)
def test_a_wrong_form_is_named(given: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        grammar(Api.CHAT, **given)
    assert caught.value.param == param


def test_a_grammar_is_one_of_the_rules() -> None:
    request = parse_chat_request({**BODY[Api.CHAT], "response_format": NAMED, "min_p": 0.1}, GatewayLimits())
    assert request.sampling.rules == {"min_p": 0.1, "grammar": Grammar("json_schema", TEXT)}
    assert "grammar" not in parse_chat_request(BODY[Api.CHAT], GatewayLimits()).sampling.rules
