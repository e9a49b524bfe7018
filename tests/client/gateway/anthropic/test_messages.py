"""The real `anthropic` package talks to the gateway, whole and streamed; errors have Anthropic's form."""

from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from tests.support.scripted_client import NO_KEYS, ScriptedClient, scripted_http

from treeswarm.errors import NodeLost
from treeswarm_client.gateway.answers.pieces import CallPiece, ChoiceAnswer, TextPiece, ThoughtPiece
from treeswarm_client.gateway.answers.writer import AnswerMetadata
from treeswarm_client.gateway.anthropic.answers import MessageWriter
from treeswarm_client.gateway.anthropic.requests import parse_messages_request
from treeswarm_client.gateway.config import ApiKeys, GatewayLimits
from treeswarm_client.gateway.events import Usage
from treeswarm_client.gateway.length import LEAST

ANSWER = "    return self.read(size)"
CALL = 'I look.\n<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>'
KEY = "sk-a-key-for-tests"
TALK: list[Any] = [{"role": "user", "content": "def read("}]
BODY: dict[str, Any] = {"model": "demo", "messages": TALK, "max_tokens": 100}


def api_of(client: ScriptedClient, key: str = KEY, keys: ApiKeys = NO_KEYS) -> AsyncAnthropic:
    http = scripted_http(client, keys)
    return AsyncAnthropic(base_url="http://127.0.0.1:8000", api_key=key, http_client=http, max_retries=0)


async def test_whole_message_is_what_the_package_expects() -> None:
    client = ScriptedClient(ANSWER)
    message = await api_of(client, keys=ApiKeys.of([KEY])).messages.create(
        **BODY,
        system="import io",
        metadata={"user_id": "me"},
        stop_sequences=["class"],
        extra_body={"temperature": 0.5, "top_k": 4},
    )
    assert [block.text for block in message.content if block.type == "text"] == [ANSWER]
    assert (message.stop_reason, message.stop_sequence, message.role, message.type) == (
        "end_turn", None, "assistant", "message",
    )  # fmt: skip
    (call,) = client.calls
    assert call["prompt"] == client.encode_chat([{"role": "system", "content": "import io"}, *TALK])
    assert (call["temperature"], call["top_k"], call["stop"], call["max_new_tokens"]) == (0.5, 4, ("class",), 100)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (len(call["prompt"]), len(client.answer))
    assert message._request_id is not None


async def test_streamed_events_are_anthropic_s() -> None:
    async with api_of(ScriptedClient(ANSWER)).messages.stream(**BODY) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_message()
    kinds = [event.type for event in events if event.type != "text"]
    assert [kind for at, kind in enumerate(kinds) if at == 0 or kind != kinds[at - 1]] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    assert [block.text for block in final.content if block.type == "text"] == [ANSWER]
    assert (final.stop_reason, final.usage.output_tokens > 5) == ("end_turn", True)


async def test_models_are_listed_in_anthropic_s_form() -> None:
    listed = [model async for model in api_of(ScriptedClient(ANSWER)).models.list()]
    assert [(model.id, model.type, model.display_name) for model in listed] == [("demo", "model", "demo")]
    assert (await api_of(ScriptedClient(ANSWER)).models.retrieve("demo")).created_at.year > 2020


async def test_stop_reasons_say_what_ended_the_text() -> None:
    short = await api_of(ScriptedClient(ANSWER)).messages.create(**BODY | {"max_tokens": 2})
    assert short.stop_reason == "max_tokens"
    stopped = await api_of(ScriptedClient(ANSWER)).messages.create(**BODY, stop_sequences=["self", "size"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "self")
    assert [block.text for block in stopped.content if block.type == "text"] == ["    return "]


async def test_length_that_the_context_cannot_hold_is_a_wish() -> None:
    """Programs ask for as many tokens as Anthropic's models take, whatever the model."""
    client = ScriptedClient(ANSWER)
    message = await api_of(client).messages.create(**BODY | {"max_tokens": 16384})
    assert message.stop_reason == "end_turn"
    assert client.calls[0]["max_new_tokens"] == LEAST
    client = ScriptedClient("x = 1\n" * 600)
    cut = await api_of(client).messages.create(**BODY | {"max_tokens": 16384})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("model_context_window_exceeded", LEAST)


async def test_answer_goes_on_with_a_last_message_of_the_assistant() -> None:
    client = ScriptedClient(ANSWER)
    talk = [*TALK, {"role": "assistant", "content": "self, size"}]
    await api_of(client).messages.create(**BODY | {"messages": talk})
    expected = client.encode_chat(talk, continue_final_message=True)
    assert client.calls[0]["prompt"] == expected
    counted = await api_of(client).messages.count_tokens(model="demo", messages=talk)
    assert counted.input_tokens == len(expected)


async def test_errors_have_anthropic_s_form() -> None:
    with pytest.raises(anthropic.AuthenticationError, match="needs an API key"):
        await api_of(ScriptedClient(ANSWER), "sk-wrong-key", ApiKeys.of([KEY])).messages.create(**BODY)
    with pytest.raises(anthropic.NotFoundError, match="'claude' is not served here: ask for demo"):
        await api_of(ScriptedClient(ANSWER)).messages.create(**BODY | {"model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="context is 2048") as long:
        await api_of(ScriptedClient(ANSWER)).messages.create(
            **BODY | {"messages": [{"role": "user", "content": "x " * 3000}]}
        )
    assert long.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert long.value.request_id == long.value.body["request_id"]  # type: ignore[index]
    client = ScriptedClient(ANSWER, fails=NodeLost("node 1 is gone", "127.0.0.1:1"))
    with pytest.raises(anthropic.APIStatusError, match="node 1 is gone"):
        [event async for event in await api_of(client).messages.create(**BODY, stream=True)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents is not known here"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 'the type "image"'),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
         "a block of type tool_use, which it cannot have"),
        ({"tools": [{"name": "f", "schema": {}}]}, "tools[0].schema is not known here"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
        ({"tools": [{"type": "web_search_20250305", "name": "f", "input_schema": {}}]}, "tools[0].type is"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking is enabled with a budget"),
        ({"temperature": "1"}, 'temperature is "1"'),
        ({"stop": ["x"]}, "the parameter stop is not known here"),
    ],
    ids=range(13),
)  # fmt: skip
async def test_what_cannot_be_honoured_is_refused_by_name(more: dict[str, Any], words: str) -> None:
    async with scripted_http(ScriptedClient(ANSWER)) as http:
        answer = await http.post("/v1/messages", json=BODY | more)
    assert (answer.status_code, answer.json()["type"]) == (400, "error")
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_of_tools_are_blocks(stream: bool) -> None:
    client = ScriptedClient(CALL)
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    asked: Any = BODY | {
        "tools": [{"name": "read", "description": "reads", "input_schema": schema}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled"},
    }
    if stream:
        async with api_of(client).messages.stream(**asked) as events:
            message = await events.get_final_message()
    else:
        message = await api_of(client).messages.create(**asked)
    text, call = message.content
    assert (text.type, call.type, message.stop_reason) == ("text", "tool_use", "tool_use")
    assert text.type == "text"
    assert text.text == "I look."
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("read", {"path": "a"})
    assert '"parameters": {"type": "object"' in client.decode(client.calls[0]["prompt"])


def test_blocks_become_messages_of_a_chat() -> None:
    used = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": "é"}}]  # fmt: skip
    results = [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "4"}]},
               {"type": "text", "text": "Go on", "cache_control": {"type": "ephemeral"}}]  # fmt: skip
    body = BODY | {
        "system": [{"type": "text", "text": "s"}],
        "messages": [*TALK, {"role": "assistant", "content": used}, {"role": "user", "content": results}],
    }
    chat = parse_messages_request(body, GatewayLimits()).chat
    assert chat is not None
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    assert [dict(message) for message in chat.messages] == [
        {"role": "system", "content": "s"},
        *TALK,
        {"role": "assistant", "reasoning_content": "hm", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "user", "content": "Go on"},
    ]
    assert not chat.continues


def test_thoughts_text_and_calls_are_blocks_of_their_own() -> None:
    pieces = [
        ThoughtPiece("hm"), TextPiece("I "), TextPiece("look"), CallPiece(0, "c1", "f", '{"a"', begins=True),
        CallPiece(0, "c1", "f", ": 1}", begins=False), CallPiece(1, "c2", "g", "{}", begins=True),
    ]  # fmt: skip
    answer = ChoiceAnswer(finish="stop")
    for piece in pieces:
        answer.add(piece)
    writer = MessageWriter(AnswerMetadata("msg_1", 0, "demo", ""), 100)
    sent = [
        *writer.begin([answer], Usage(3, 0, 0)),
        *writer.end_choice(0, answer, pieces),
        *writer.end([answer], Usage(3, 9, 1)),
    ]
    starts = [event["content_block"]["type"] for event in sent if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    stops = [event["index"] for event in sent if event["type"] == "content_block_stop"]
    assert stops == [0, 1, 2, 3]
    json_parts = [e["delta"]["partial_json"] for e in sent if e.get("delta", {}).get("type") == "input_json_delta"]
    assert json_parts == ['{"a"', ": 1}", "{}"]
    assert sent[-2]["delta"]["stop_reason"] == "tool_use"
    assert sent[-2]["usage"] == {
        "input_tokens": 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 1, "output_tokens": 9,
    }  # fmt: skip
    whole = writer.whole([answer], Usage(3, 9, 1))
    assert [block["type"] for block in whole["content"]] == starts
    assert whole["content"][2]["input"] == {"a": 1}
