"""A conversation is written as transformers writes it, or refused."""

import json
import shutil
from pathlib import Path

import pytest
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


def test_named_templates_and_a_file_are_found(tmp_path: Path) -> None:
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": PLAIN}]
    folder = model_with(tmp_path / "m", chat_template=several)
    named = load_chat_template(folder)
    assert named is not None
    assert named.render(TALK[1:2]) == "<|user|>Was gibt's, 世界?<|endoftext|>\n"
    (folder / "chat_template.jinja").write_text("file: {{ messages[0]['content'] }}")
    from_file = load_chat_template(folder)
    assert from_file is not None
    assert from_file.render(TALK[-1:]) == "file: So?"


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
        (TALK, "one at a time"),
    ],
)
def test_an_invalid_conversation_is_refused(tmp_path: Path, messages: list[dict[str, object]], reason: str) -> None:
    template = load_chat_template(model_with(tmp_path / "m", chat_template=REFUSING))
    assert template is not None
    with pytest.raises(BadRequest, match=reason):
        template.render(messages)


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    template = load_chat_template(model_with(tmp_path / "m", chat_template=escape))
    assert template is not None
    with pytest.raises(BadRequest, match="refuses"):
        template.render(TALK)
