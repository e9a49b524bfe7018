"""The real openai package calls tools and reads thoughts through a real gateway; the model's text is scripted."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from tests.support.scripted_chat import hermes_call, scripted_gateway

# A template of its own that has what Qwen's has: tools, calls, results and thinking.
TEMPLATE = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
<tool_call></tool_call>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<call>{{ call.function.name }}:{{ call.function.arguments | tojson }}</call>
{%- endfor %}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
PLAIN = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}<|assistant|>"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {}, "strict": True}}
ASK: list[Any] = [{"role": "user", "content": "How is it in Zürich?"}]
THOUGHT = "<think>\nA city.\n</think>\n\n"
CALLS = f"{hermes_call('weather', city='Zürich')}\n{hermes_call('add', numbers=[1, 2])}"


async def ask(api: AsyncOpenAI, stream: bool = False, **options: Any) -> Any:
    """Return the choice of an answer; a streamed one is put together by the openai package itself."""
    options = {"model": "demo", "messages": ASK, "max_tokens": 500} | options
    if not stream:
        return (await api.chat.completions.create(**options)).choices[0]
    async with api.chat.completions.stream(**options) as events:
        return (await events.get_final_completion()).choices[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_and_thoughts_are_split_off(tmp_path: Path, stream: bool) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer = f"{THOUGHT}I look.\n{CALLS}"
        choice = await ask(api, stream, tools=[WEATHER, ADD])
        assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
        assert choice.message.reasoning_content == "A city."
        made = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
        assert made == [("weather", {"city": "Zürich"}), ("add", {"numbers": [1, 2]})]
        ids = [call.id for call in choice.message.tool_calls]
        assert len(set(ids)) == 2
        assert all(id.startswith("call_") and len(id) == 29 for id in ids)
        client.answer = CALLS
        assert (await ask(api, stream, tools=[WEATHER, ADD])).message.content in (None, "")  # as the package has it


async def test_chunks_of_a_call_are_openais(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer = hermes_call("weather", city="Zürich")
        chunks = [
            chunk.choices[0]
            async for chunk in await api.chat.completions.create(
                model="demo", messages=ASK, tools=[WEATHER], stream=True
            )
        ]
        first, *others = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert first.function is not None
        assert (first.index, first.type, first.function.name) == (0, "function", "weather")
        assert first.function.arguments == ""
        assert len(others) > 3
        assert all(call.function is not None and call.id is None and call.function.name is None for call in others)
        assert "".join(call.function.arguments or "" for call in others if call.function) == '{"city": "Zürich"}'
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
        assert not any(chunk.delta.content for chunk in chunks)


async def test_a_conversation_with_results_goes_on(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer = hermes_call("weather", city="Zürich")
        message = (await ask(api, tools=[WEATHER])).message
        client.answer = "Rain."
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 mm"}
        choice = await ask(api, tools=[WEATHER], messages=[*ASK, message, result])
        assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("Rain.", "stop", None)
        assert '<|assistant|><call>weather:{"city": "Zürich"}</call>' in client.prompt
        assert "<|tool|>12 mm" in client.prompt
        assert '"name": "weather"' in client.prompt


async def test_without_tools_or_with_none_calls_are_text(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer = hermes_call("weather", city="Bern")
        for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
            choice = await ask(api, **options)
            assert (choice.message.content, choice.finish_reason) == (client.answer, "stop")
            assert "<tools>" not in client.prompt


async def test_only_one_call_where_parallel_calls_are_off(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer = f"Now.\n{CALLS}\nMore."
        choice = await ask(api, tools=[WEATHER, ADD], parallel_tool_calls=False)
        assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
        assert choice.message.content == "Now."


async def test_a_call_that_must_come_has_a_grammar(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer = hermes_call("weather", city="Bern")
        for choice, names in (
            ("required", ("weather", "add")),
            ({"type": "function", "function": {"name": "weather"}}, ("weather",)),
        ):
            answer = await ask(api, tools=[WEATHER, ADD], tool_choice=choice, extra_body={"min_p": 0.1})
            assert answer.finish_reason == "tool_calls"
            rules = client.options["rules"]
            assert (rules.min_p, rules.grammar.kind) == (0.1, "lark")
            assert tuple(name for name in ("weather", "add") if f'\\"{name}\\"' in rules.grammar.text) == names
            assert ("add" in client.prompt, "weather" in client.prompt) == (True, True)
        await ask(api, tools=[WEATHER, ADD])
        assert client.options["rules"].grammar is None
        with pytest.raises(openai.BadRequestError, match="leaves no room for another grammar"):
            await ask(api, tools=[ADD], tool_choice="required", response_format={"type": "json_object"})


@pytest.mark.parametrize("stream", [False, True])
async def test_functions_of_the_older_form_are_called(tmp_path: Path, stream: bool) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer = CALLS
        choice = await ask(api, stream, functions=[WEATHER["function"], ADD["function"]], function_call="auto")
        assert choice.finish_reason == "function_call"
        assert choice.message.function_call.name == "weather"
        assert json.loads(choice.message.function_call.arguments) == {"city": "Zürich"}
        assert choice.message.tool_calls is None
        client.answer = "Rain."
        called = {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "weather", "arguments": '{"city": "B"}'},
        }
        result = {"role": "function", "name": "weather", "content": "12 mm"}
        options = {"functions": [WEATHER["function"]], "messages": [*ASK, called, result]}
        assert (await ask(api, stream, **options)).message.content == "Rain."
        assert '<call>weather:{"city": "B"}</call>' in client.prompt
        assert "<|tool|>12 mm" in client.prompt
        with pytest.raises(openai.BadRequestError, match="give one of the two"):
            await ask(api, functions=[ADD["function"]], tools=[ADD])
        with pytest.raises(openai.BadRequestError, match="tool_choice names x"):
            await ask(api, functions=[ADD["function"]], function_call={"name": "x"})
        with pytest.raises(openai.BadRequestError, match="there are no tools"):
            await ask(api, function_call={"name": "x"})


async def test_a_call_that_the_length_cuts_ends_with_length(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer, client.finish = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zü', "length"
        choice = await ask(api, tools=[WEATHER])
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Zü'


async def test_special_tokens_of_the_format_are_read_and_others_left_out(tmp_path: Path) -> None:
    template = PLAIN + "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[TOOL_CALLS]{% endif %}"
    special = ["[TOOL_CALLS]", "[ARGS]", "[REFERENCE]"]
    async with scripted_gateway(tmp_path, template, special=special) as (client, api):
        client.answer = '[REFERENCE]Now.[TOOL_CALLS]weather[ARGS]{"city": "Bern"}'
        choice = await ask(api, tools=[WEATHER])
        assert choice.message.content == "Now."
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Bern"}')
        assert len(call.id) == 9  # Mistral's templates take no other
        assert (await ask(api)).message.content == 'Now.weather{"city": "Bern"}'


async def test_harmony_channels_are_told_apart_without_tools_too(tmp_path: Path) -> None:
    special = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>"]
    template = f"{PLAIN}{{# <|channel|>analysis<|message|> #}}{{{{ reasoning_effort }}}}"
    async with scripted_gateway(tmp_path, template, special=special) as (client, api):
        client.answer = (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Sun.<|return|>"
        )
        choice = await ask(api, reasoning_effort="high")
        assert (choice.message.content, choice.message.reasoning_content) == ("Sun.", "Hm.")
        assert client.prompt.endswith("<|assistant|>high")


async def test_how_much_a_model_thinks_reaches_its_template(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (client, api):
        client.answer = "Sun."
        no_thinking = "<|assistant|><think>\n\n</think>\n\n"
        for options, ends in (
            ({"reasoning_effort": "none"}, True),
            ({"reasoning_effort": "low"}, False),
            ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, True),
            ({}, False),
        ):
            choice = await ask(api, **options)
            assert client.prompt.endswith(no_thinking) is ends
            assert choice.message.content == "Sun."


async def test_no_parser_leaves_thoughts_and_calls_in_the_text(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE, reasoning_parser="none", tool_parser="none") as (client, api):
        client.answer = f"{THOUGHT}Sun."
        assert (await ask(api)).message.content == client.answer
        with pytest.raises(openai.BadRequestError, match=r"calls are not read here.*--tool-parser none"):
            await ask(api, tools=[WEATHER])


async def test_tools_are_described_where_the_template_leaves_them_out(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, PLAIN) as (client, api):
        client.answer = CALLS
        assert (await ask(api)).message.content == CALLS  # nothing was offered
        assert "functions" not in client.prompt
        message = (await ask(api, tools=[WEATHER])).message
        assert [call.function.name for call in message.tool_calls] == ["weather", "add"]
        assert client.prompt.startswith("<|system|>You may call functions")
        assert '{"name": "weather", "description": "Weather of a city"' in client.prompt
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
        with pytest.raises(openai.BadRequestError, match="list of objects with a function"):
            await ask(api, tools=[WEATHER], messages=[*ASK, {"role": "assistant", "tool_calls": [{"function": "f"}]}])
        await ask(api, tools=[WEATHER], messages=[{"role": "system", "content": "Be kind."}, *ASK, message, result])
        assert client.prompt.startswith("<|system|>Be kind.\n\nYou may call functions")
        assert '<|assistant|><tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}' in client.prompt
        assert "<|user|><tool_response>\nrain\n</tool_response>" in client.prompt
    async with scripted_gateway(tmp_path, PLAIN, tool_parser="llama") as (_, api):
        with pytest.raises(openai.BadRequestError, match="leaves tools out") as refused:
            await ask(api, tools=[WEATHER])
        assert refused.value.param == "tools"


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", r'tools\[0\].type is "web_search": give function'),
        ({"tools": [{"type": "function"}]}, "tools", r"tools\[0\].function is missing"),
        (function(name="a b"), "tools", r'tools\[0\].function.name is "a b"'),
        (function(parameters=[1]), "tools", "parameters is .1.: give an object"),
        (function(parameters={"type": "array"}), "tools", 'parameters.type is "array": arguments are an object'),
        (function(parameters={"properties": {"x": 3}}), "tools", "properties.x is no JSON schema"),
        (function(parameters={"required": "x"}), "tools", 'required is "x": give a list of names'),
        (function(descriptio="x"), "tools", "did you mean description"),
        ({"tools": [WEATHER, WEATHER]}, "tools", 'two functions named "weather"'),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "one of add"),
        ({"tools": [ADD], "tool_choice": "sometimes"}, "tool_choice", "give auto, none or required"),
        ({"tools": [ADD], "tool_choice": {"type": "custom"}}, "tool_choice", 'give "function"'),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "give none, minimal"),
    ],
    ids=range(14),
)
async def test_wrong_tools_are_refused_by_name(tmp_path: Path, options: dict[str, Any], param: str, words: str) -> None:
    async with scripted_gateway(tmp_path, TEMPLATE) as (_, api):
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            await ask(api, **options)
        assert refused.value.param == param


async def test_a_model_without_a_setting_refuses_it(tmp_path: Path) -> None:
    async with scripted_gateway(tmp_path, PLAIN) as (client, api):
        client.answer = "Sun."
        assert (await ask(api, reasoning_effort="none")).message.content == "Sun."
        with pytest.raises(openai.BadRequestError, match="has no such setting"):
            await ask(api, reasoning_effort="high")
