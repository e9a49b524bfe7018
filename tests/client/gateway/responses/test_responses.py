"""The real `openai` package reads responses, whole and streamed; what cannot be honoured is refused by name."""

import json
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from tests.support.scripted_client import ScriptedClient, scripted_backend, scripted_http

from treeswarm.errors import NodeLost
from treeswarm_client.gateway.answers.pieces import CallPiece, ChoiceAnswer, TextPiece, ThoughtPiece
from treeswarm_client.gateway.answers.writer import AnswerMetadata
from treeswarm_client.gateway.app import make_app
from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.events import Usage
from treeswarm_client.gateway.generation_request import ParameterError
from treeswarm_client.gateway.responses.answers import ResponseWriter
from treeswarm_client.gateway.responses.requests import parse_responses_request

ANSWER = "    return self.read(size)"
CALL = 'I look.\n<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>'
BODY: dict[str, Any] = {"model": "demo", "input": "def read("}


def api_of(client: ScriptedClient) -> AsyncOpenAI:
    http = scripted_http(client)
    return AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http, max_retries=0)


async def test_whole_response_is_what_the_package_expects() -> None:
    client = ScriptedClient(ANSWER)
    response = await api_of(client).responses.create(
        model="demo", input="def read(", instructions="import io", max_output_tokens=100, metadata={"a": "b"}, user="me"
    )
    assert (response.output_text, response.status, response.object) == (ANSWER, "completed", "response")
    assert (response.metadata, response.instructions, response.store) == ({"a": "b"}, "import io", False)
    assert response.usage is not None
    talk = [{"role": "system", "content": "import io"}, {"role": "user", "content": "def read("}]
    assert client.calls[0]["prompt"] == client.encode_chat(talk)
    assert response.usage.input_tokens == len(client.calls[0]["prompt"])
    assert response.usage.output_tokens == len(client.answer)
    assert response.id.startswith("resp_")


async def test_streamed_events_are_numbered_and_complete() -> None:
    events: list[Any] = []
    async with api_of(ScriptedClient(ANSWER)).responses.stream(model="demo", input="def read(") as stream:
        async for event in stream:
            events.append(event)
        final = await stream.get_final_response()
    kinds = [event.type for event in events]
    assert [kind for at, kind in enumerate(kinds) if at == 0 or kind != kinds[at - 1]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert final.output_text == ANSWER
    assert final.output[0].id == next(e for e in events if e.type == "response.output_text.done").item_id


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_that_reaches_its_length_is_incomplete(stream: bool) -> None:
    answer: Any = await api_of(ScriptedClient(ANSWER)).responses.create(
        model="demo", input="x", max_output_tokens=3, stream=stream, include=["message.output_text.logprobs"]
    )
    if stream:
        events = [event async for event in answer]
        assert events[-1].type == "response.incomplete"
        answer = events[-1].response
        streamed = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
        assert len(streamed) == 3
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    part = answer.output[0].content[0]
    assert bytes(byte for one in part.logprobs for byte in one.bytes).decode() == part.text
    assert answer.output[0].status == "incomplete" if stream else "completed"


async def test_failure_of_a_stream_is_an_event() -> None:
    client = ScriptedClient(ANSWER, fails=NodeLost("node 1 is gone", "127.0.0.1:1"))
    events = [event async for event in await api_of(client).responses.create(model="demo", input="x", stream=True)]
    last: Any = events[-1]
    assert (last.type, last.response.status, last.response.error.message) == (
        "response.failed", "failed", "node 1 is gone",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "schema": {}}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f g"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"summary": "auto"}}, "reasoning"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "contents": "x"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": 5}, "input"),
        ({"text": {"format": {"type": "yaml"}}}, "text"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"temprature": 1}, "temprature"),
    ],
    ids=range(19),
)
async def test_what_cannot_be_honoured_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await api_of(ScriptedClient(ANSWER)).responses.create(**(BODY | {"extra_body": more}))
    assert refused.value.param == param


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_of_tools_are_items(stream: bool) -> None:
    client = ScriptedClient(CALL)
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    tool = {"type": "function", "name": "read", "description": "reads", "parameters": parameters, "strict": True}
    answer: Any = await api_of(client).responses.create(
        **BODY, tools=[tool], tool_choice="auto", stream=stream, reasoning={"effort": "none"}
    )
    if stream:
        events = [event async for event in answer]
        assert "response.function_call_arguments.delta" in [event.type for event in events]
        answer = events[-1].response
    text, call = answer.output
    assert (text.content[0].text, text.type) == ("I look.", "message")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "read", {"path": "a"})
    assert call.call_id != call.id
    told = client.decode(client.calls[0]["prompt"])
    assert '"name": "read"' in told
    assert '"strict"' not in told


def test_items_become_messages_of_a_chat() -> None:
    call = {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "c1",
        "name": "f",
        "arguments": "{}",
        "status": "completed",
    }
    said = [{"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": []}]
    items = [
        {"role": "developer", "content": "s"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": said},
        call,
        call | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "4"},
    ]
    chat = parse_responses_request(BODY | {"input": items, "instructions": "be brief"}, GatewayLimits()).chat
    assert chat is not None
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in ("c1", "c2")]
    assert [dict(message) for message in chat.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "hm", "content": "Yes.", "tool_calls": calls},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]


def test_thoughts_text_and_calls_are_items_of_their_own() -> None:
    pieces = [
        ThoughtPiece("hm"), TextPiece("I "), TextPiece("look"), CallPiece(0, "c1", "f", '{"a"', begins=True),
        CallPiece(0, "c1", "f", ": 1}", begins=False), CallPiece(1, "c2", "g", "{}", begins=True),
    ]  # fmt: skip
    answer = ChoiceAnswer(finish="stop")
    writer = ResponseWriter(AnswerMetadata("resp_1", 0, "demo", ""), BODY, None)
    for piece in pieces:
        answer.add(piece)
    sent = [
        *writer.begin([answer], Usage(3, 0, 0)),
        *writer.end_choice(0, answer, pieces),
        *writer.end([answer], Usage(3, 9, 0)),
    ]
    whole = ResponseWriter(AnswerMetadata("resp_1", 0, "demo", ""), BODY, None).whole([answer], Usage(3, 9, 0))
    assert sent[-1]["response"] == whole
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert whole["output"][2] | {"id": ""} == {
        "type": "function_call", "id": "", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "status": "completed",
    }  # fmt: skip
    done = [event for event in sent if event["type"] == "response.function_call_arguments.done"]
    assert [(event["name"], event["arguments"]) for event in done] == [("f", '{"a": 1}'), ("g", "{}")]


async def test_tokens_of_thoughts_are_counted() -> None:
    client = ScriptedClient("<think>\nI look at the path.\n</think>\n\nYes.")
    backend = scripted_backend(client)
    backend.config = replace(backend.config, reasoning_parser="think")
    transport = httpx2.ASGITransport(make_app(backend))
    http = httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
    api = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http, max_retries=0)
    response = await api.responses.create(**BODY)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.output_text, response.usage is not None) == ("Yes.", True)
    assert response.usage is not None
    thoughts = response.usage.output_tokens_details.reasoning_tokens
    assert 4 < thoughts < response.usage.output_tokens


def test_parameters_that_other_apis_have_are_refused() -> None:
    for name in ("messages", "max_tokens", "stop", "n"):
        with pytest.raises(ParameterError, match=name):
            parse_responses_request(BODY | {name: 1}, GatewayLimits())
