"""Chat templates: a conversation as text for the model.

Templates are Jinja programs that come with a model's tokenizer.  They run in a sandbox, and may call the functions that
transformers documents for them.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from treeswarm.errors import BadRequest
from treeswarm.model_files import read_json

MessageDict = Mapping[str, Any]
"""A message, with `role` and `content` at least."""
ROLES = ("system", "developer", "user", "assistant", "tool")
# Text that no template writes of its own.
PROBE = "6f9a2c text of a user"
# Errors of templates, which are programs of the model's publisher.
FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
# Special tokens of a tokenizer's config that templates write by name.
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template, and the special tokens it may write."""

    template: Template | None
    """The template, or None if it does not compile: the model can still continue texts."""
    special: Mapping[str, str]
    problem: str = ""
    """Why the template does not compile."""
    takes_parts: bool = False
    """Whether the template reads the content of a message as a list of parts, as those of multimodal models do."""

    def render(self, messages: Sequence[MessageDict], *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as text.  Raises BadRequest if it is invalid, or if the template refuses it."""
        for message in messages:
            if not isinstance(message, Mapping) or message.get("role") not in ROLES:
                raise BadRequest(f"every message needs a role, one of {', '.join(ROLES)}")
            if not isinstance(message.get("content"), str):
                raise BadRequest(f"the content of a message of role {message['role']} is not text")
        if not messages:
            raise BadRequest("there are no messages: give at least one of role user")
        if self.template is None:
            raise BadRequest(f"{self.problem}: this model only continues texts, as `swarm generate` does")
        if self.takes_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            return _write(self.template, messages, self.special, add_generation_prompt=add_generation_prompt)
        except FAILURES as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}") from None


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Read the template of a model's tokenizer or processor, or return None if there is none.  Raises ModelError.

    A template that does not compile raises only when a conversation is to be written.
    """
    config = _read_object(folder, "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    try:
        if file.exists():
            source: str | None = file.read_text("utf-8")
        else:  # Processors of multimodal models had a file of their own.
            of_processor = _default_of(_read_object(folder, "chat_template.json").get("chat_template"))
            source = of_processor or _default_of(config.get("chat_template"))
        if source is None:
            return None
        special = _special_of(_read_object(folder, "special_tokens_map.json") | config)  # older tokenizers have both
        template = _environment().from_string(source)
        return ChatTemplate(template, special, takes_parts=_takes_parts(template, special))
    except (TemplateError, RecursionError, SyntaxError, ValueError) as error:  # Jinja compiles to Python.
        return ChatTemplate(None, {}, f"the chat template of '{folder}' does not compile ({error})")


def _write(
    template: Template, messages: Sequence[MessageDict], special: Mapping[str, str], *, add_generation_prompt: bool
) -> str:
    # Transformers passes tools and documents to every template, and templates ask whether they are none.
    return template.render(
        messages=list(messages),
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **special,
    )


def _takes_parts(template: Template, special: Mapping[str, str]) -> bool:
    """Return whether a template writes a message's text only if its content is a list of parts."""
    message = {"role": "user", "content": PROBE}
    return not _writes_text(template, message, special) and _writes_text(template, _in_parts(message), special)


def _writes_text(template: Template, message: MessageDict, special: Mapping[str, str]) -> bool:
    try:
        return PROBE in _write(template, [message], special, add_generation_prompt=True)
    except FAILURES:
        return False


def _in_parts(message: MessageDict) -> MessageDict:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dict if there is no such file or it holds no object."""
    path = folder / name
    content = read_json(path, "") if path.exists() else {}
    return content if isinstance(content, dict) else {}


def _default_of(templates: Any) -> str | None:
    """Return the default template; some models have several, by name."""
    if isinstance(templates, list):
        named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
        templates = named.get("default", next(iter(named.values()), None))
    return templates if isinstance(templates, str) else None


def _special_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens by name.  A config has them as text, or as the object of an added token."""
    special = {}
    for name in SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return special


class _GenerationTag(Extension):
    """The tag `{% generation %}` of transformers: it marks what the assistant says, and writes its body."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
