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
        try:
            # Transformers passes tools and documents to every template, and templates ask whether they are none.
            return self.template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except (
            TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
        ) as error:  # fmt: skip
            raise BadRequest(f"the model's chat template refuses these messages: {error}") from None


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Read `chat_template.jinja` or `tokenizer_config.json`, or return None if there is none.  Raises ModelError.

    A template that does not compile raises only when a conversation is to be written.
    """
    config = _tokenizer_config(folder)
    file = folder / "chat_template.jinja"
    try:
        source = file.read_text("utf-8") if file.exists() else _default_of(config.get("chat_template"))
        if source is None:
            return None
        return ChatTemplate(_environment().from_string(source), _special_of(_legacy_special(folder) | config))
    except (TemplateError, RecursionError, SyntaxError, ValueError) as error:  # Jinja compiles to Python.
        return ChatTemplate(None, {}, f"the chat template of '{folder}' does not compile ({error})")


def _legacy_special(folder: Path) -> dict[str, Any]:
    """Return the special tokens of `special_tokens_map.json`, where older tokenizers have them."""
    path = folder / "special_tokens_map.json"
    special = read_json(path, "") if path.exists() else {}
    return special if isinstance(special, dict) else {}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    config = read_json(path, "")
    return config if isinstance(config, dict) else {}


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
