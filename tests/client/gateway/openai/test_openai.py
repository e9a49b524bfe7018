"""The real `openai` package works with a real gateway over three real nodes."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import httpx2
import openai
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel, StringConstraints
from tests.support.gateway_process import Gateway, gateway

from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = "class Queue:\n    def __init__(self"
TALK: list[Any] = [
    {"role": "system", "content": "import os"},
    {"role": "user", "content": "def read("},
    {"role": "assistant", "content": "path):"},
    {"role": "user", "content": [{"type": "text", "text": "    with open"}]},
]
AS_TEXT = [{"role": message["role"], "content": message["content"]} for message in TALK[:3]] + [
    {"role": "user", "content": "    with open"}
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    async with local_swarm("demo", even_cuts(8, 3)) as swarm:
        yield swarm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(swarm: LocalSwarm) -> AsyncIterator[Gateway]:
    async with gateway(swarm.peers, "--draft", "ngram") as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(served: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with served.openai() as api:
        yield api


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def library(swarm: LocalSwarm) -> AsyncIterator[SwarmClient]:
    """A client of the library, which must give the same texts as the gateway."""
    async with SwarmClient(model="demo", peers=swarm.peers, draft="ngram") as client:
        yield client


async def wait_until_no_sessions(library: SwarmClient) -> None:
    """Wait until no node has a session."""
    for _ in range(200):
        if not any(node.sessions for node in (await library.describe_nodes()).values()):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("sessions stay open")


async def test_models_are_listed(api: AsyncOpenAI) -> None:
    assert [model.id async for model in api.models.list()] == ["demo"]
    assert (await api.models.retrieve("demo")).owned_by == "swarm"


async def test_chat_continues_the_template(api: AsyncOpenAI, library: SwarmClient) -> None:
    prompt = library.encode_chat(AS_TEXT)
    expected = await library.generate(prompt, max_new_tokens=24)
    answer = await api.chat.completions.create(model="demo", messages=TALK, max_completion_tokens=24, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 24)
    assert answer.system_fingerprint == f"{library.target.numerics.weights[:12]}-float32"


async def test_stream_has_the_same_text_and_ends(api: AsyncOpenAI, library: SwarmClient) -> None:
    expected = await library.generate(library.encode_chat(AS_TEXT), max_new_tokens=24)
    stream = await api.chat.completions.create(
        model="demo", messages=TALK, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == expected.text
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


async def test_responses_and_messages_have_the_same_text(
    api: AsyncOpenAI, served: Gateway, library: SwarmClient
) -> None:
    expected = await library.generate(library.encode_chat(AS_TEXT), max_new_tokens=24)
    options: dict[str, Any] = {"model": "demo", "temperature": 0}
    response = await api.responses.create(**options, input=AS_TEXT, max_output_tokens=24)
    assert response.output_text == expected.text
    talk: dict[str, Any] = {"model": "demo", "messages": TALK[1:], "system": "import os", "max_tokens": 24}
    async with (
        AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as anthropic,
        anthropic.messages.stream(**talk, extra_body={"temperature": 0}) as stream,
    ):
        assert "".join([text async for text in stream.text_stream]) == expected.text


async def test_completions_of_texts_and_of_token_ids(api: AsyncOpenAI, library: SwarmClient) -> None:
    prompts = ["import os\n", PROMPT]
    expected = [await library.generate(prompt, max_new_tokens=12) for prompt in prompts]
    texts = await api.completions.create(model="demo", prompt=prompts, max_tokens=12, temperature=0)
    assert [choice.text for choice in texts.choices] == [run.text for run in expected]
    assert [choice.index for choice in texts.choices] == [0, 1]
    ids = await api.completions.create(model="demo", prompt=library.encode(PROMPT), max_tokens=12, temperature=0)
    assert ids.choices[0].text == expected[1].text


async def test_stop_string_ends_the_text_before_it(api: AsyncOpenAI, library: SwarmClient) -> None:
    whole = (await library.generate(PROMPT, max_new_tokens=40)).text
    stop = whole[len(whole) // 3 :][:4]
    expected = whole[: whole.index(stop)]
    for stream in (False, True):
        request: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        if stream:
            chunks = [c.choices[0] async for c in await api.completions.create(**request, stop=[stop], stream=True)]
            text, finish = "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason
        else:
            choice = (await api.completions.create(**request, stop=stop)).choices[0]
            text, finish = choice.text, choice.finish_reason
        assert (text, finish) == (expected, "stop")


async def test_seed_repeats_samples_and_n_makes_them_differ(api: AsyncOpenAI, library: SwarmClient) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    expected = [await library.generate(PROMPT, max_new_tokens=16, sample=i, **options) for i in range(3)]
    answer = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=16, n=3, **options)
    assert [choice.text for choice in answer.choices] == [run.text for run in expected]
    assert len({choice.text for choice in answer.choices}) == 3
    texts = ["", "", ""]
    async for chunk in await api.completions.create(
        model="demo", prompt=PROMPT, max_tokens=16, n=3, stream=True, **options
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [run.text for run in expected]


async def test_answers_without_a_seed_differ(api: AsyncOpenAI) -> None:
    answers = [await api.completions.create(model="demo", prompt=PROMPT, max_tokens=24) for _ in range(2)]
    assert answers[0].choices[0].text != answers[1].choices[0].text


async def test_logprobs_are_those_of_the_library(api: AsyncOpenAI, library: SwarmClient) -> None:
    expected = await library.generate(library.encode_chat(AS_TEXT), max_new_tokens=8)
    chat = await api.chat.completions.create(model="demo", messages=TALK, max_tokens=8, temperature=0, logprobs=True)
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert [entry.logprob for entry in content] == pytest.approx(
        expected.logprobs, abs=1e-4
    )  # forward passes of other shapes round differently
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content
    assert bytes(byte for entry in content for byte in entry.bytes or []).decode() == chat.choices[0].message.content
    scored = await library.generate(PROMPT, max_new_tokens=8, prompt_logprobs=3, top_logprobs=3)
    echoed = await api.completions.create(
        model="demo", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, echo=True
    )
    values = echoed.choices[0].logprobs
    assert values is not None
    expected_values = [score.logprob for score in (scored.prompt_logprobs or [])[1:] if score] + scored.logprobs
    assert (values.token_logprobs or [])[1:] == pytest.approx(expected_values, abs=1e-4)
    assert echoed.choices[0].text == PROMPT + scored.text
    assert all(top is None or len(top) in (3, 4) for top in values.top_logprobs or [])
    text = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=0)
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == text.choices[0].text
    assert all(logprob is not None and logprob <= 0 for logprob in logprobs.token_logprobs or [None])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_must_come_comes(api: AsyncOpenAI, stream: bool) -> None:
    """The model is trained on code alone, and knows no tools: its grammar makes it call one."""
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}}}
    tools: Any = [
        {"type": "function", "function": {"name": "weather", "parameters": {**schema, "required": ["unit", "days"]}}},
        {"type": "function", "function": {"name": "now"}},
    ]
    options: dict[str, Any] = {"model": "demo", "messages": TALK, "tools": tools, "max_tokens": 60, "seed": 3}
    options["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    if stream:
        async with api.chat.completions.stream(**options) as events:
            (choice,) = (await events.get_final_completion()).choices
    else:
        (choice,) = (await api.chat.completions.create(**options)).choices
    (call,) = choice.message.tool_calls or []
    arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
    assert (call.function.name, choice.finish_reason) == ("weather", "tool_calls")  # type: ignore[union-attr]
    assert arguments["unit"] in ("C", "F")
    assert arguments["days"] <= 9
    assert set(arguments) == {"unit", "days"}


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        ({"frequency_penalty": 3}, "frequency_penalty", "from -2 to 2"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "1 to 64 letters"),
        ({"response_format": {"type": "grammar"}}, "response_format", "give .text"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, None, "unclosed group"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"n": 99}, "n", "at most 16"),
        ({"extra_body": {"beam_width": 4}}, "beam_width", "not known"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages", "reads text"),
        ({"messages": [{"role": "emperor", "content": "x"}]}, "messages", "give system, developer"),
        ({"max_tokens": 100_000}, "messages", "context is 2048"),
    ],
    ids=range(13),
)  # fmt: skip
async def test_unsupported_parameters_are_refused_by_name(
    api: AsyncOpenAI, arguments: dict[str, Any], param: str | None, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        await api.chat.completions.create(**{"model": "demo", "messages": TALK} | arguments)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


class Described(BaseModel):
    name: Annotated[str, StringConstraints(max_length=9)]
    kind: Literal["function", "class"]


async def test_answers_have_the_form_that_was_asked_for(api: AsyncOpenAI) -> None:
    """In each API with the methods of its own package, and from a drafter that guesses other texts."""
    parsed = await api.chat.completions.parse(
        model="demo", messages=TALK, max_tokens=64, temperature=0, response_format=Described
    )
    assert parsed.choices[0].message.parsed is not None
    assert parsed.choices[0].finish_reason == "stop"
    response = await api.responses.parse(
        model="demo", input="def f(", max_output_tokens=64, temperature=0, text_format=Described
    )
    assert response.output_parsed is not None
    choice = await api.completions.create(
        model="demo", prompt=PROMPT, max_tokens=32, extra_body={"structured_outputs": {"choice": ["yes, yes", "nö"]}}
    )
    assert choice.choices[0].text in ("yes, yes", "nö")
    stream = await api.chat.completions.create(
        model="demo", messages=TALK, max_tokens=32, stream=True, extra_body={"guided_regex": "[0-9]{3}-[a-z]{4}"}
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert re.fullmatch("[0-9]{3}-[a-z]{4}", text)


async def test_too_long_completion_names_its_prompt(api: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 2048") as refused:
        await api.completions.create(model="demo", prompt="x", max_tokens=100_000)
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")


async def test_parameters_without_effect_are_accepted(api: AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(
        model="demo", messages=TALK, max_tokens=2, frequency_penalty=0, presence_penalty=0, user="me", store=False,
        response_format={"type": "text"}, logit_bias={}, extra_body={"top_k": 4},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "length"


async def test_unknown_model_and_page_are_openai_errors(api: AsyncOpenAI, served: Gateway) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here: ask for demo") as refused:
        await api.chat.completions.create(model="gpt-4", messages=TALK)
    assert refused.value.code == "model_not_found"
    async with httpx2.AsyncClient(base_url=served.url) as http:
        for path, problem in (("/v1/engines", "GET /v1/engines is not served here"), ("/v1", "/v1 is the base URL")):
            missing = await http.get(path)
            assert missing.status_code == 404
            assert missing.json()["error"]["message"].startswith(problem)
            assert "POST /v1/chat/completions" in missing.json()["error"]["message"]
        wrong = (await http.get("/v1/chat/completions")).json()["error"]["message"]
        assert wrong == "GET /v1/chat/completions is not served here: use POST"
        broken = await http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
        assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
        large = await http.post("/v1/completions", content=b"x" * (5 << 20))
        assert large.status_code == 413


async def test_disconnected_callers_free_their_sessions(api: AsyncOpenAI, library: SwarmClient) -> None:
    async def leave_a_stream() -> None:
        stream = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=1500, stream=True)
        async for _ in stream:
            break
        await stream.close()

    async def leave_an_answer() -> None:
        with pytest.raises(openai.APITimeoutError):
            await api.completions.create(model="demo", prompt=PROMPT, max_tokens=1500, timeout=1.5)

    await asyncio.gather(leave_a_stream(), leave_an_answer())
    await wait_until_no_sessions(library)


async def test_concurrent_streams_stay_apart(api: AsyncOpenAI, library: SwarmClient) -> None:
    prompts = [f"def function_{i}(self, value{i}):\n    return" for i in range(8)]
    expected = [(await library.generate(prompt, max_new_tokens=16)).text for prompt in prompts]

    async def stream_answer(prompt: str) -> str:
        stream = await api.completions.create(model="demo", prompt=prompt, max_tokens=16, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    assert list(await asyncio.gather(*map(stream_answer, prompts))) == expected
    await wait_until_no_sessions(library)


async def test_metrics_count_a_request(api: AsyncOpenAI, served: Gateway) -> None:
    before = await served.metrics()
    answer = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0)
    after = await served.metrics()

    def increase(name: str) -> float:
        return after[f"treeswarm_gateway_{name}"] - before.get(f"treeswarm_gateway_{name}", 0)

    assert answer.usage is not None
    assert increase('tokens_total{kind="completion"}') == 20
    assert increase('tokens_total{kind="prompt"}') == answer.usage.prompt_tokens
    assert increase('requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert increase("first_token_seconds_count") == 1
    assert increase("inter_token_seconds_count") == 19
    assert increase("traversals_total") == increase("tokens_per_traversal_count") + 1
    assert after["treeswarm_gateway_nodes"] == 3
    assert (after["treeswarm_gateway_ready"], after["treeswarm_gateway_missing_blocks"]) == (1, 0)
    assert after["treeswarm_gateway_generations"] == 0


async def test_curl_receives_the_stream(served: Gateway, library: SwarmClient) -> None:
    curl = shutil.which("curl")
    assert curl is not None, "curl is not installed: apt install curl"
    expected: Run = await library.generate(PROMPT, max_new_tokens=12)
    body = json.dumps({"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True})
    command = [curl, "-sN", f"{served.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=True)
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == expected.text
