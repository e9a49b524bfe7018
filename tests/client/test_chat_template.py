"""A conversation is written as transformers writes it, or refused."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from treeswarm.errors import BadRequest
from treeswarm.model_files import load_tokenizer, resolve_model
from treeswarm_client.chat_template import load_chat_template
from treeswarm_client.prompt_encoder import load_prompt_encoder

PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
WITH_ALL = """{{ bos_token }}{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}
{%- endif %}
{% for message in messages %}
    {% if message['role'] == 'tool' %}{% continue %}{% endif %}
    {{ message | tojson }} {{ loop.index }}{% if loop.last %}{{ eos_token }}{% endif %}

{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
REFUSING = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0]['content'] }}"
TALK = [
    {"role": "system", "content": " Be <brief> & kind.\n"},
    {"role": "user", "content": "Was gibt's, 世界?"},
    {"role": "tool", "content": "{}"},
    {"role": "assistant", "content": "Not much."},
    {"role": "user", "content": "So?"},
]

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def call_of(arguments: dict[str, object]) -> dict[str, object]:
    """Return a call as OpenAI's messages have it: its arguments are text."""
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": text}}


def model_with(folder: Path, **tokenizer_config: object) -> Path:
    shutil.copytree(resolve_model("demo"), folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokenizer_config))
    return folder


EXTENDED = """{%- for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{% set word = m.content %}  {{ word }}
{% endgeneration %}{{ word is defined }}
{% else %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ m | tojson(indent=2) }}{% endif %}
{%- endfor %}{{ messages | tojson(separators=(',', ':'), sort_keys=True, ensure_ascii=True) }}{{ '<b>' | tojson }}
{{- strftime_now('%Y') }}{{ tools is none }}{{ documents is none }}{{ mask_token }}{{ cls_token is defined }}
{%- set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ dict(a=1) | tojson }}"""


@pytest.mark.parametrize("template", [PLAIN, WITH_ALL, EXTENDED])
def test_a_template_renders_as_in_transformers(tmp_path: Path, template: str) -> None:
    folder = model_with(tmp_path / "m", chat_template=template, mask_token="<|endoftext|>")
    ours = load_chat_template(folder)
    assert ours is not None
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.render(TALK) == theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(folder).encode(ours.render(TALK), add_special_tokens=False).ids == ids


def theirs_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_a_template_for_tools_is_taken_where_tools_are_given(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "{{ tools | tojson }}"}, {"name": "default", "template": PLAIN}]
    folder = model_with(tmp_path / "m", chat_template=several)
    ours, theirs = load_chat_template(folder), theirs_of(folder)
    assert ours is not None
    for tools in (None, [], TOOLS):
        assert ours.render(TALK[1:2], tools=tools) == theirs.apply_chat_template(TALK[1:2], tools, tokenize=False)
    files = folder / "additional_chat_templates"
    files.mkdir()
    (files / "tool_use.jinja").write_text("tools: {{ tools | length }}")
    (folder / "chat_template.jinja").write_text("file: {{ messages[0]['content'] }}")
    from_files, theirs = load_chat_template(folder), theirs_of(folder)
    assert from_files is not None
    assert from_files.render(TALK[-1:]) == "file: So?"
    assert from_files.render(TALK, tools=TOOLS) == "tools: 1" == theirs.apply_chat_template(TALK, TOOLS, tokenize=False)


def test_several_templates_without_a_default_stop_plain_chats_alone(tmp_path: Path) -> None:
    only_tools = {"name": "tool_use", "template": "{{ tools | length }}"}
    template = load_chat_template(model_with(tmp_path / "m", chat_template=[only_tools]))
    assert template is not None
    assert template.render(TALK, tools=TOOLS) == "1"
    with pytest.raises(BadRequest, match="none named default"):
        template.render(TALK)


def test_special_tokens_of_a_model_have_their_names(tmp_path: Path) -> None:
    words = "{{ bos_token }}|{{ boi_token }}|{{ image_token }}|{{ eos_token }}|{{ nothing_token }}"
    named = {"image_token": "<|image|>"}
    folder = model_with(
        tmp_path / "m", chat_template=words, boi_token="<boi>", bos_token=None, extra_special_tokens=named
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|other|>"}))
    ours = load_chat_template(folder)
    assert ours is not None
    assert ours.render(TALK) == theirs_of(folder).apply_chat_template(TALK, tokenize=False)
    assert "<boi>|<|image|>" in ours.render(TALK)


# Programs of publishers as they are: what each calls, and where it refuses.
PROGRAMS = {
    "dict": "{{ dict([['a', 1]], b=2) | tojson }}{{ dict.fromkeys(['k'], 3) }}",
    "dict's class": "{{ dict.__mro__ }}{{ dict.mro() }}",
    "namespace": "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = 3 %}{{ ns.a }}{{ ns.self }}{{ ns.b }}",
    "hidden attribute": "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "hidden attribute at once": "{% set ns = namespace(_x=1) %}",
    "unknown option": "{{ messages | tojson(cls=1) }}",
    "changing": "{% set _ = messages.append(1) %}{{ messages | length }}",
    "exception": "{{ raise_exception('not with ' ~ messages[0].role) }}",
    "undefined": "{{ messages[0].nothing.more }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}/{{ m.reasoning }};{% endfor %}",
    "null fields": "{% for m in messages %}{{ 'tool_calls' in m }}{{ m.name is defined }}{% endfor %}",
    "arguments": "{% for c in messages[1].tool_calls %}{{ c.function.arguments | items | list }}{% endfor %}",
    "variables": "{{ enable_thinking }}{{ reasoning_effort }}{{ eos_token }}{{ [tools, documents] | tojson }}",
}
WITH_CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Hm?", "name": None},
    {"role": "assistant", "content": None, "thinking": "So.", "tool_calls": [call_of({"city": "Zürich", "n": 2})]},
    {"role": "tool", "content": "sun", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Sun.", "reasoning": "It shines.", "tool_calls": None},
]


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_what_templates_call_is_as_in_transformers(tmp_path: Path, program: str) -> None:
    folder = model_with(tmp_path / "m", chat_template=program)
    ours, theirs = load_chat_template(folder), theirs_of(folder)
    assert ours is not None
    variables = {"enable_thinking": False, "reasoning_effort": "low", "eos_token": "<end>"}
    documents = [{"title": "T", "text": "x"}]
    with_objects = copy.deepcopy(WITH_CALLS)
    made = with_objects[1]["tool_calls"][0]["function"]
    made["arguments"] = json.loads(made["arguments"])
    try:
        expected = theirs.apply_chat_template(with_objects, TOOLS, documents, tokenize=False, **variables)
    except (TemplateError, TypeError) as refusal:
        with pytest.raises(BadRequest, match="refuses these messages"):
            ours.render(WITH_CALLS, tools=TOOLS, documents=documents, template_kwargs=variables)
        assert refusal
    else:
        rendered = ours.render(WITH_CALLS, tools=TOOLS, documents=documents, template_kwargs=variables)
        assert rendered == expected


JOINS = "{% for m in messages %}{% for c in m.tool_calls %}{{ 'call ' + c.function.arguments }}{% endfor %}{% endfor %}"
PRINTS = JOINS.replace("'call ' + ", "")
READS_CONTENT = "{% for m in messages %}{{ m.role + m.content }}{{ m.get('tool_calls') | tojson }}{% endfor %}"


@pytest.mark.parametrize(("program", "text"), [(JOINS, "call {}"), (PRINTS, "{}")], ids=["joins", "prints"])
def test_arguments_are_text_where_a_template_wants_text(tmp_path: Path, program: str, text: str) -> None:
    template = load_chat_template(model_with(tmp_path / "m", chat_template=program))
    assert template is not None
    assert template.render(WITH_CALLS) == text.format('{"city": "Zürich", "n": 2}')


def test_missing_content_is_empty_where_a_template_reads_it(tmp_path: Path) -> None:
    reads = load_chat_template(model_with(tmp_path / "reads", chat_template=READS_CONTENT))
    assert reads is not None
    assert 'assistant[{"id": "c1"' in reads.render(WITH_CALLS[:2])
    # A template that leaves the calls out would show the model an empty answer instead.
    leaves_out = READS_CONTENT.replace("{{ m.get('tool_calls') | tojson }}", "")
    template = load_chat_template(model_with(tmp_path / "leaves out", chat_template=leaves_out))
    assert template is not None
    with pytest.raises(BadRequest, match="has no attribute 'content'"):
        template.render(WITH_CALLS[:2])


STRIPS = PLAIN.replace("m['content']", "m['content'] | trim")
LEAVES_OUT = "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}"
THINKS = "{% for m in messages %}<think>{{ m.thinking }}</think>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("field", [True, "reasoning_content"])
@pytest.mark.parametrize(
    "program", [PLAIN, STRIPS, LEAVES_OUT, THINKS], ids=["plain", "strips", "leaves out", "thinks"]
)
def test_last_message_is_continued_as_in_transformers(tmp_path: Path, program: str, field: bool | str) -> None:
    folder = model_with(tmp_path / "m", chat_template=program)
    ours, theirs = load_chat_template(folder), theirs_of(folder)
    assert ours is not None
    for last in ({"content": "It is "}, {"content": "", "reasoning_content": " Let me"}):
        talk = [*TALK, {"role": "assistant", **last}]
        try:
            expected = theirs.apply_chat_template(talk, tokenize=False, continue_final_message=field)
        except ValueError:
            with pytest.raises(BadRequest):
                ours.render(talk, continue_final_message=field)
        else:
            assert ours.render(talk, continue_final_message=field) == expected


OF_PARTS = """{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'][0]['type'] == 'image' %}!{% endif %}
{%- for part in m['content'] %}{% if part['type'] == 'text' %} {{ part['text'] | trim }}{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_a_multimodal_template_is_given_text_in_parts(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "m")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": OF_PARTS}))
    ours = load_chat_template(folder)
    assert ours is not None
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK]
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(in_parts, chat_template=OF_PARTS, tokenize=False, add_generation_prompt=True)
    assert "Was gibt's, 世界?" in expected
    assert ours.render(TALK) == expected


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(model_with(tmp_path / "m")) is None


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", r"Expected an expression, got 'end of statement block'"),
        ("{% for a in messages %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        (b"{{ messages }} \xff", "invalid start byte"),
    ],
    ids=["syntax", "loops", "no text"],
)
def test_a_template_that_does_not_compile_stops_chats_alone(tmp_path: Path, template: str | bytes, reason: str) -> None:
    folder = model_with(tmp_path / "m")
    (folder / "chat_template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    encoder = load_prompt_encoder("m", folder)
    assert encoder.encode("import os")
    with pytest.raises(BadRequest, match=rf"does not compile \(.*{reason}.*`swarm generate` does"):
        encoder.encode_chat(TALK)


def test_a_template_that_calls_itself_without_end_is_refused(tmp_path: Path) -> None:
    endless = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    encoder = load_prompt_encoder("m", model_with(tmp_path / "m", chat_template=endless))
    with pytest.raises(BadRequest, match="refuses these messages: maximum recursion depth"):
        encoder.encode_chat(TALK)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"content": "x"}], "needs a role"),
        ([{"role": "emperor", "content": "x"}], "needs a role"),
        ([{"role": "user", "content": [1]}], "is not text"),
        ([{"role": "user", "content": None}], "is not text"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "must be a list of objects"),
        ([{"role": "user", "content": "x", "when": Path()}], "is no JSON"),
        (TALK, "one at a time"),
    ],
)
def test_an_invalid_conversation_is_refused(tmp_path: Path, messages: list[dict[str, object]], reason: str) -> None:
    template = load_chat_template(model_with(tmp_path / "m", chat_template=REFUSING))
    assert template is not None
    with pytest.raises(BadRequest, match=reason):
        template.render(messages)


def test_names_of_arguments_are_no_variables(tmp_path: Path) -> None:
    template = load_chat_template(model_with(tmp_path / "m", chat_template=PLAIN))
    assert template is not None
    with pytest.raises(BadRequest, match="'messages' is no variable"):
        template.render(TALK, template_kwargs={"messages": []})


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    template = load_chat_template(model_with(tmp_path / "m", chat_template=escape))
    assert template is not None
    with pytest.raises(BadRequest, match="refuses"):
        template.render(TALK)
