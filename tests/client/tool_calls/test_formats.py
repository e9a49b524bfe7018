"""Answers of every family are told apart: text, thinking and calls, whatever the pieces they come in."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.errors import BadRequest
from treeswarm_client.tool_calls.events import ArgumentsText, CallBegun, CallEnded, ContentText, ReasoningText
from treeswarm_client.tool_calls.formats import CALL_FORMAT_NAMES, REASONING_FORMAT_NAMES, find_format
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.parser import AnswerParser

WEATHER = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "raw": {}}}
ADD = {"properties": {"numbers": {"type": "array"}}}
TOOLS = OfferedTools({"weather": WEATHER, "add": ADD})
BERN, SUM = ("weather", {"city": "Bern", "days": 2}), ("add", {"numbers": [1, 2.5]})


@dataclass
class Answer:
    """What all events of an answer bring together."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    @property
    def values(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def parse(
    pieces: Sequence[str], tool_parser: str, reasoning_parser: str = "none", tools: OfferedTools | None = TOOLS
) -> Answer:
    parser = AnswerParser(find_format("", tool_parser, reasoning_parser), tools)
    answer = Answer()
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        match event:
            case ContentText(text):
                answer.content += text
            case ReasoningText(text):
                answer.reasoning += text
            case CallBegun(index, name, id):
                assert index == len(answer.calls)
                answer.calls.append((name, ""))
                answer.ids.append(id)
            case ArgumentsText(index, text):
                assert index == len(answer.calls) - 1 == len(answer.ended)
                answer.calls[index] = (answer.calls[index][0], answer.calls[index][1] + text)
            case CallEnded(index):
                answer.ended.append(index)
    assert answer.ended == list(range(len(answer.calls)))
    return answer


# What models of each family write: thinking where the family thinks, some text, and two calls.
WRITTEN: dict[str, tuple[str, str]] = {
    "hermes": (
        "think",
        "<think>\nHm, so.\n</think>\n\nI look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"numbers": [1, 2.5]}}\n</tool_call>',
    ),
    "qwen3-coder": (
        "think",
        "<think>\nHm, so.\n</think>\n\nI look.\n<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=add>\n<parameter=numbers>\n[1, 2.5]\n</parameter>\n</function>\n</tool_call>",
    ),
    "glm": (
        "think",
        "\n<think>Hm, so.</think>\nI look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
        "<tool_call>add<arg_key>numbers</arg_key><arg_value>[1, 2.5]</arg_value></tool_call>",
    ),
    "llama": (
        "none",
        '{"name": "weather", "parameters": {"city": "Bern", "days": 2}}; {"name": "add", "parameters": '
        '{"numbers": [1, 2.5]}}',
    ),
    "mistral": (
        "mistral",
        '[THINK]Hm, so.[/THINK]I look.[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern", "days": 2}}, '
        '{"name": "add", "arguments": {"numbers": [1, 2.5]}}]',
    ),
    "deepseek": (
        "think",
        "<think>\nHm, so.\n</think>\n\nI look."
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Bern", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>add<｜tool▁sep｜>'
        '{"numbers": [1, 2.5]}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "kimi": (
        "think",
        "<think>Hm, so.</think>I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"city": "Bern", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.add:1'
        '<|tool_call_argument_begin|>{"numbers": [1, 2.5]}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    "harmony": (
        "harmony",
        "<|channel|>analysis<|message|>Hm, so.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Bern", "days": 2}<|call|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>'
        '{"numbers": [1, 2.5]}<|call|>',
    ),
    "gemma": (
        "gemma",
        '<|channel>thought\nHm, so.\n<channel|>I look.<|tool_call>call:weather{city:<|"|>Bern<|"|>,days:2}<tool_call|>'
        "<|tool_call>call:add{numbers:[1,2.5]}<tool_call|>",
    ),
    "functiongemma": (
        "none",
        "<start_function_call>call:weather{city:<escape>Bern<escape>,days:2}<end_function_call>"
        "<start_function_call>call:add{numbers:[1,2.5]}<end_function_call>",
    ),
    "lfm2": (
        "think",
        "<think>Hm, so.</think>I look.<|tool_call_start|>[weather(city='Bern', days=2), add(numbers=[1, 2.5])]"
        "<|tool_call_end|>",
    ),
    "minimax": (
        "think",
        '<think>Hm, so.</think>I look.\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Bern'
        '</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n<invoke name="add">\n'
        '<parameter name="numbers">[1, 2.5]</parameter>\n</invoke>\n</minimax:tool_call>',
    ),
    "cohere": (
        "cohere",
        '<|START_THINKING|>Hm, so.<|END_THINKING|>I look.<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": '
        '"weather", "parameters": {"city": "Bern", "days": 2}},\n    {"tool_call_id": "1", "tool_name": "add", '
        '"parameters": {"numbers": [1, 2.5]}}\n]<|END_ACTION|>',
    ),
    "phi": (
        "none",
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Bern", "days": 2}}, '
        '{"name": "add", "arguments": {"numbers": [1, 2.5]}}]<|/tool_call|>',
    ),
}


def test_every_format_has_an_answer_here() -> None:
    assert set(WRITTEN) == set(CALL_FORMAT_NAMES)


@pytest.mark.parametrize("name", WRITTEN)
def test_an_answer_is_told_apart(name: str) -> None:
    reasoning, text = WRITTEN[name]
    for pieces in ([text], list(text)):
        answer = parse(pieces, name, reasoning)
        assert answer.values == [BERN, SUM]
        has_text = "I look." in text
        assert (answer.content, answer.reasoning) == ("I look." * has_text, "Hm, so." * ("Hm, so." in text))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_prefix_of_an_answer_shows_no_mark(name: str) -> None:
    """Wherever a stream stops, nothing of the format has been shown that the whole answer does not show."""
    reasoning, text = WRITTEN[name]
    whole = parse([text], name, reasoning)
    parser = AnswerParser(find_format("", name, reasoning), TOOLS)
    shown = ""
    for character in text:
        shown += "".join(event.text for event in parser.feed(character) if isinstance(event, ContentText))
        assert whole.content.startswith(shown)


OTHERS = [
    ("hermes", '<tool_call>[{"name": "add", "arguments": "{\\"numbers\\": [1, 2.5]}"}]</tool_call>', [SUM], ""),
    ("hermes", '<tool_call>{"arguments": {"numbers": [1, 2.5]}, "name": "add"}</tool_call>', [SUM], ""),
    ("hermes", '<tool_call>{"name": "add"}</tool_call> Done.', [("add", {})], "Done."),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"t": "</tool_call>"}}}\n</tool_call>', None, ""),
    ("hermes", "Write <tool_call>JSON</tool_call>.", [], "Write <tool_call>JSON</tool_call>."),
    ("hermes", '<tool_call> <tool_call>{"name": "add", "arguments": null}', [("add", {})], "<tool_call>"),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', [], None),
    ("hermes", '<tool_call>{"name": "add", "argu', [], None),
    ("hermes", "a < b <tool", [], None),
    ("hermes", " \n", [], None),
    ("qwen3-coder", "<function=add>\n</function>\n</tool_call>", [("add", {})], ""),
    ("qwen3-coder", "<tool_call>\nadd()\n</tool_call>", [], None),
    ("glm", "<tool_call>add</tool_call>", [("add", {})], ""),
    ("glm", "<tool_call>two words</tool_call>", [], None),
    ("llama", '<|python_tag|>{"name": "add", "parameters": {}}', [("add", {})], ""),
    ("llama", '<|python_tag|>brave_search.call(query="a b")', [("brave_search", {"query": "a b"})], ""),
    ("llama", "[add(numbers=[1, 2.5])]", [SUM], ""),
    ("llama", '{"name": "Bob", "parameters": {}}', [], None),
    ("llama", "[1, 2]", [], None),
    ("llama", '[{"a": 1}]', [], None),
    ("llama", "[link](add) and {", [], None),
    ("llama", 'So: {"name": "add", "parameters": {}}', [], None),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"numbers": [1, 2.5]}', [SUM], ""),
    ("mistral", 'I look.[TOOL_CALLS]add[CALL_ID]abc[ARGS]{"numbers": [1, 2.5]}', [SUM], "I look."),
    ("mistral", '[TOOL_CALLS]add{"numbers": [1, 2.5]}[TOOL_CALLS]add{}', [SUM, ("add", {})], ""),
    ("kimi", '<|tool_call_begin|>add<|tool_call_argument_begin|>{"numbers": [1]}<|tool_call_end|>', [], None),
    ("harmony", "<|channel|>final<|message|>Sun.<|return|>", [], "Sun."),
    ("harmony", "Sun, no <|header|>.", [], None),
    ("harmony", "Sun.<|channel|>analysis<|message|>Hm.", [], "Sun."),
    ("gemma", '<|tool_call>call:f{o:{<|"|>k<|"|>:[true,null,<|"|>"<|"|>],n:word}}<tool_call|>', None, ""),
    ("gemma", "<|tool_call>f(x)<tool_call|>", [], None),
    ("lfm2", "<|tool_call_start|>[add(numbers=[1, 2.5])]<|tool_call_end|>Now.", [SUM], "Now."),
    ("lfm2", "<|tool_call_start|>[__import__('os').system('x')]<|tool_call_end|>", [], None),
    ("lfm2", "<|tool_call_start|>[f(x=open('a'))]<|tool_call_end|>", [], None),
]


@pytest.mark.parametrize(("name", "text", "calls", "content"), OTHERS)
def test_unusual_and_broken_calls(name: str, text: str, calls: list[Any] | None, content: str | None) -> None:
    """`content` None stands for the whole text: it was to be a call and is none."""
    for pieces in ([text], list(text)):
        answer = parse(pieces, name)
        assert answer.content == (text if content is None else content)
        if calls is not None:
            assert answer.values == calls


# The last marks of DeepSeek's and Kimi's sections are special tokens, which no length cuts.
@pytest.mark.parametrize(
    "name", [name for name in WRITTEN if WRITTEN[name][1].rstrip().endswith(">") and name not in ("deepseek", "kimi")]
)
def test_a_mark_that_is_cut_after_a_call_is_no_content(name: str) -> None:
    reasoning, text = WRITTEN[name]
    whole = parse([text], name, reasoning)
    closer = text.rstrip()[text.rstrip().rindex("<") :]
    for cut in range(1, len(closer)):
        answer = parse([text.rstrip()[:-cut]], name, reasoning)
        assert (answer.content, len(answer.calls)) == (whole.content, len(whole.calls))


def test_arguments_that_break_off_stay_as_written() -> None:
    text = 'I look. <tool_call>{"name": "weather", "arguments": {"city": "Be'
    answer = parse([text], "hermes")
    assert answer.calls == [("weather", '{"city": "Be')]
    closed = parse(['<tool_call>{"name": "add", "arguments": {"a": ]}</tool_call>Then'], "hermes")
    assert closed.calls == [("add", '{"a": ]}')]
    assert closed.content == "Then"


def test_arguments_come_as_they_are_written() -> None:
    parser = AnswerParser(find_format("", "qwen3-coder", "none"), TOOLS)
    parser.feed("<tool_call><function=weather><parameter=city>")
    assert parser.feed('Be"') == [ArgumentsText(0, '"Be\\"')]
    assert parser.feed("rn\n") == [ArgumentsText(0, "rn")]
    assert parser.feed("</parameter>") == [ArgumentsText(0, '"')]
    assert parser.has_calls


def test_ids_of_the_model_are_kept() -> None:
    assert parse([WRITTEN["kimi"][1]], "kimi", "think").ids == ["functions.weather:0", "functions.add:1"]
    assert parse([WRITTEN["cohere"][1]], "cohere", "cohere").ids == ["0", "1"]


def test_calls_are_text_where_no_tools_are_offered() -> None:
    text = WRITTEN["hermes"][1]
    assert parse([text], "hermes", "think", tools=None).content == text.partition("</think>\n\n")[2]


def test_thinking_that_the_prompt_begins_goes_on() -> None:
    form = find_format("<think></think>")
    assert form.reasoning is not None
    ends = {"a<think>\n": True, "<think>\n\n</think>\n\n": False, "what is <think>?<assistant>": False, "": False}
    assert {prompt: form.reasoning.ends(prompt) for prompt in ends} == ends
    opened = {"<think>Let": True, "<think>Let</think>So": False, "So": False}
    assert {answer: form.reasoning.is_open_in(answer) for answer in opened} == opened
    for is_thinking in (True, False):
        parser = AnswerParser(form, None, is_thinking=is_thinking)
        events = [*parser.feed("Hm.</think> Sun."), *parser.finish()]
        expected = [ReasoningText("Hm."), ContentText("Sun.")] if is_thinking else [ContentText("Hm.</think> Sun.")]
        assert events == expected


def test_values_have_the_types_of_the_schema() -> None:
    point = {"$defs": {"P": {"type": "object"}}, "properties": {"p": {"$ref": "#/$defs/P"}}}
    unions = {"a": {"type": ["integer", "null"]}, "b": {"anyOf": [{"type": "number"}, {"type": "string"}]}}
    tools = OfferedTools(
        {"f": point, "g": {"properties": unions | {"c": {"enum": [1, "x"]}, "d": {"type": "boolean"}}}}
    )
    read = [
        ("f", "p", '{"x": 1}', {"x": 1}),
        ("g", "a", "null", None),
        ("g", "a", "3.0", 3),
        ("g", "a", "3.5", "3.5"),
        ("g", "b", "2.5", 2.5),
        ("g", "b", "nan", "nan"),
        ("g", "c", "1", 1),
        ("g", "c", "x", "x"),
        ("g", "d", "True", True),
        ("g", "unknown", "75001", "75001"),
    ]
    for tool, name, written, value in read:
        assert tools.value(tool, name, written) == value
        assert type(tools.value(tool, name, written)) is type(value)


def test_a_schema_that_refers_to_itself_is_read() -> None:
    circle = {"$defs": {"A": {"$ref": "#/$defs/A"}}, "properties": {"x": {"$ref": "#/$defs/A"}}}
    assert OfferedTools({"f": circle}).value("f", "x", "1") == "1"


# One template of each family, cut down to the marks by which it is known.
TEMPLATES = {
    "<tools></tools><tool_call>{{ c }}</tool_call>": ("hermes", None),
    "<think></think><tool_call>\n<function=x>\n<parameter=y>": ("qwen3-coder", "think"),
    "<tool_call>{n}\n<arg_key>{k}</arg_key> </think>": ("glm", "think"),
    '<|start_header_id|>{"name": n, "parameters": {}}': ("llama", None),
    "[TOOL_CALLS][/INST] [THINK][/THINK]": ("mistral", "mistral"),
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>": ("deepseek", None),
    "<|channel>thought\n<channel|><|tool_call>call:": ("gemma", "gemma"),
    "<|im_start|>{{ content }}": (None, None),
}


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.items())
def test_a_template_tells_the_format(template: str, expected: tuple[str | None, str | None]) -> None:
    form = find_format(template)
    calls, reasoning = (part.name if part is not None else None for part in (form.calls, form.reasoning))
    assert (calls, reasoning) == expected
    assert find_format("<|channel|>analysis<|message|>").is_harmony


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"no tool parser 'x': give auto, none, or one of harmony, gemma"):
        find_format("", "x")
    with pytest.raises(BadRequest, match=r"no reasoning parser 'y'.*think"):
        find_format("", reasoning_parser="y")
    assert "think" in REASONING_FORMAT_NAMES


FRAGMENTS = st.sampled_from(
    [
        *(mark for name in CALL_FORMAT_NAMES for mark in find_format("", name, "none").marks),
        *("<think>", "</think>", "[THINK]", "<|channel>thought\n", "<channel|>"),
        *("weather", "add", "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ":", ";", "\n", " ", "=", "<", "ü", "1"),
        *(
            '{"name": "add", "arguments": {"numbers": [1]}}',
            '{"name": "weather", "parameters": {"city": "x"}}',
            "call:",
        ),
        *(
            "functions.add:0",
            "to=functions.add",
            "analysis",
            "final",
            "assistant",
            "```json\n",
            "city=",
            "weather(city=",
        ),
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(WRITTEN)),
    st.one_of(st.lists(FRAGMENTS, max_size=12).map("".join), st.sampled_from([text for _, text in WRITTEN.values()])),
    st.randoms(use_true_random=False),
)
def test_pieces_change_nothing(name: str, text: str, chance: random.Random) -> None:
    cuts = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse([text], name, WRITTEN[name][0])
    assert parse(pieces, name, WRITTEN[name][0]) == whole
    assert parse(list(text), name, WRITTEN[name][0]) == whole
