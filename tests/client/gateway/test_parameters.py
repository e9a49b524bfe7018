"""Every parameter of a request is honoured, has no effect, or is refused by name; no value is taken for another."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.scripts import load_script

from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.generation_request import ParameterError
from treeswarm_client.gateway.openai.requests import parse_chat_request, parse_completion_request
from treeswarm_client.gateway.parameters.parameter import Api
from treeswarm_client.gateway.parameters.table import FORM, NEUTRAL, REFUSED, TABLE, parameters_of, read_request

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
LIMITS = GatewayLimits()
COMPLETION: dict[str, Any] = {"model": "demo", "prompt": "x"}
BODIES: dict[Api, dict[str, Any]] = {
    Api.CHAT: CHAT,
    Api.COMPLETIONS: COMPLETION,
    Api.RESPONSES: {"model": "demo", "input": "x"},
    Api.MESSAGES: CHAT | {"max_tokens": 5},
}


def refusal(api: Api, **more: Any) -> str:
    """Return the error for a request with these parameters."""
    with pytest.raises(ParameterError) as refused:
        read_request(BODIES[api] | more, api)
    assert refused.value.param == next(iter(more))
    return str(refused.value)


@pytest.mark.parametrize("api", BODIES)
def test_no_parameter_is_in_the_table_twice(api: Api) -> None:
    names = Counter(parameter.name for parameter in parameters_of(api))
    assert [name for name, count in names.items() if count > 1] == []


def test_documentation_has_the_table_of_now() -> None:
    page = load_script("parameters").PAGE.read_text("utf-8")
    assert page == load_script("parameters").with_tables(page), "run `python scripts/parameters.py`"
    assert "| `logit_bias` |" in page


@pytest.mark.parametrize("api", BODIES)
def test_values_without_effect_leave_the_request_as_it_is(api: Api) -> None:
    plain = read_request(BODIES[api], api)
    for parameter in (*REFUSED, *FORM):
        if api in parameter.apis:
            for value in (None, *(parameter.neutral or ())):
                assert read_request(BODIES[api] | {parameter.name: value}, api) == plain, (parameter.name, value)
    for parameter in NEUTRAL:
        if api in parameter.apis:
            assert read_request(BODIES[api] | {parameter.name: {"any": ["thing"]}}, api) == plain


@pytest.mark.parametrize("api", BODIES)
def test_other_values_are_refused_by_name(api: Api) -> None:
    for parameter in (*REFUSED, *FORM):
        if api in parameter.apis:
            assert parameter.name in refusal(api, **{parameter.name: ["another value"]})


@pytest.mark.parametrize("api", BODIES)
@given(value=st.sampled_from([True, "0.5", "", [[]], {"a": {}}, float("nan"), 1e300, -7, "x" * 300, [None], 10**400]))
def test_no_value_of_another_type_passes(api: Api, value: Any) -> None:
    """What a check lets through is what it declares, whatever the value; nothing else than its error is raised."""
    kinds = {"number": float, "integer": int, "boolean": bool, "string": str}
    for parameter in TABLE:
        if api in parameter.apis and parameter.check is not None and parameter.name not in ("prompt", "model"):
            try:
                read = read_request(BODIES[api] | {parameter.name: value}, api)[parameter.name]
            except ParameterError as error:
                assert len(str(error)) < 400
                continue
            kind = kinds.get(parameter.check.schema.get("type", ""))
            assert kind is None or type(read) is kind, parameter.name


def test_errors_are_in_plain_words() -> None:
    assert refusal(Api.CHAT, temperature="0.5") == 'temperature is "0.5": give a number from 0 to 2'
    assert refusal(Api.CHAT, temperature=True) == "temperature is true: give a number from 0 to 2"
    assert refusal(Api.CHAT, max_tokens=1.5) == "max_tokens is 1.5: give a whole number from 1 to 2147483647"
    assert refusal(Api.CHAT, stop=["x"] * 17) == "stop has 17 stop strings: at most 16 stop strings"
    assert refusal(Api.CHAT, stream=1) == "stream is 1: give true or false"
    assert refusal(Api.CHAT, temprature=1) == "the parameter temprature is not known here: did you mean temperature?"
    assert refusal(Api.CHAT, store=True).startswith("store is true, which cannot be honoured: leave it out, or give fa")
    assert refusal(Api.CHAT, logit_bias={"a": 1}) == 'logit_bias names "a", which is no token id: give numbers as names'
    assert refusal(Api.CHAT, messages="x") == 'messages is "x": give a list of messages'


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "contents": "x"}, "messages[0].contents is not known here: did you mean content?"),
        ({"role": "user"}, "messages[0].content is missing"),
        ({"role": "user", "content": None}, "messages[0].content is missing"),
        ({"role": "user", "content": 5}, "messages[0].content is 5: give a text or a list of parts"),
        ({"content": "x"}, "messages[0].role is missing"),
        ({"role": "user", "content": [{"type": "text", "txt": "x"}]}, "messages[0].content[0].txt is not known here"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, 'messages[0].content[0] has the type "input_audio"'),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[0].content[0].type is missing"),
        ({"role": "user", "content": ["x"]}, 'messages[0].content[0] is "x": give an object'),
        ({"role": "user", "content": "x", "audio": {"id": "a"}}, "messages[0].audio is"),
        ("x", 'messages[0] is "x": give an object'),
    ],
    ids=range(11),
)
def test_what_a_message_cannot_be_is_named(message: Any, words: str) -> None:
    with pytest.raises(ParameterError) as refused:
        parse_chat_request(CHAT | {"messages": [message]}, LIMITS)
    assert words in str(refused.value)
    assert refused.value.param == "messages"


def test_what_stream_options_cannot_be_is_named() -> None:
    assert "stream_options.usage is not known here" in refusal(Api.CHAT, stream_options={"usage": True})
    assert "stream_options.include_usage is 1: give true" in refusal(Api.CHAT, stream_options={"include_usage": 1})


def test_messages_reach_the_template_with_what_it_may_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = CHAT | {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts, "name": "Ada"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ]
    }
    chat = parse_chat_request(body, LIMITS).chat
    assert chat is not None
    assert [dict(message) for message in chat.messages] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab", "name": "Ada"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]


def test_knobs_become_rules_and_settings() -> None:
    knobs = {
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "min_p": 0.1,
        "logit_bias": {"7": -100, "3": 1}, "typical_p": 0.9, "no_repeat_ngram_size": 3, "min_tokens": 2,
    }  # fmt: skip
    request = parse_completion_request(
        COMPLETION | knobs | {"top_p": 0, "top_k": -1, "seed": -1, "bad_words": ["no"], "stop_token_ids": [4]},
        LIMITS,
    )
    assert request.sampling.rules == knobs | {"logit_bias": ((3, 1.0), (7, -100.0))}
    assert request.sampling.settings == {"top_p": 1e-6, "top_k": 0}
    assert (request.sampling.seed, request.sampling.bad_words) == (2**63 - 1, ("no",))
    assert (request.ends.stop_token_ids, request.ends.max_tokens, request.ends.default_max_tokens) == ((4,), None, 16)


@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_messages_of_any_shape_are_read_or_refused(body: Any) -> None:
    try:
        parsed = parse_chat_request(json.loads(json.dumps(CHAT | {"messages": body})), LIMITS)
    except ParameterError as error:
        assert error.param == "messages"
    else:
        assert parsed.chat is not None
        assert all(isinstance(message.get("content", ""), str) for message in parsed.chat.messages)


def test_answer_is_a_new_message_or_goes_on_with_the_last_one() -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I"}]
    body = CHAT | {"messages": talk, "chat_template_kwargs": {"enable_thinking": False}}
    chat = parse_chat_request(body, LIMITS).chat
    assert chat is not None
    assert (chat.continues, chat.template_kwargs) == (False, {"enable_thinking": False})
    chat = parse_chat_request(body | {"continue_final_message": True, "add_generation_prompt": False}, LIMITS).chat
    assert chat is not None
    assert chat.continues
    for refused in (
        {"add_generation_prompt": False},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": True, "messages": talk[:1]},
    ):
        with pytest.raises(ParameterError, match="continue_final_message"):
            parse_chat_request(body | refused, LIMITS)
