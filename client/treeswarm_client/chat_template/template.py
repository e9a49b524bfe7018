"""A model's chat template: it writes a conversation as text, as `apply_chat_template` of transformers does."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import Template

from treeswarm.errors import BadRequest
from treeswarm_client.chat_template.environment import FAILURES
from treeswarm_client.chat_template.messages import (
    REASONING_NAMES,
    MessageDict,
    check_messages,
    plain_value,
    prepare_messages,
    wanted_forms,
    with_call_names,
    written_as_python,
)

# Text that no template writes of its own, to find out what a template reads.
PROBE = "6f9a2c text of a user"
# Marks the end of a message that is continued.  The space shows whether the template strips messages.
END_MARK = "END-OF-6f9a2c "
# Names that are no variables of a template but arguments of what renders it.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")


@dataclass(frozen=True)
class BrokenTemplate:
    """A template that does not compile: the model can still continue texts."""

    problem: str


@dataclass(frozen=True)
class CompiledTemplate:
    """A template that compiles, and the special tokens that it may write."""

    template: Template
    source: str
    special: Mapping[str, str]

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template reads a message's text only from a list of parts, as those of multimodal models do."""
        message = {"role": "user", "content": PROBE}
        return not self._writes_text(message) and self._writes_text(_in_parts(message))

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the tools that it is given, so that the model knows them."""
        described = {"name": "f", "description": PROBE, "parameters": {"type": "object", "properties": {}}}
        talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        for messages in (talk, talk[1:]):
            given = [_in_parts(message) for message in messages] if self.takes_parts else messages
            with suppress(*FAILURES):
                return PROBE in self.write(given, {"tools": [{"type": "function", "function": described}]})
        return False

    def write(self, messages: Sequence[MessageDict], variables: Mapping[str, Any]) -> str:
        """Return what the template writes.  Raises one of FAILURES."""
        # Templates ask whether tools and documents are none, not whether they are defined.
        defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
        return self.template.render(**{**self.special, **defaults, **variables}, messages=list(messages))

    def _writes_text(self, message: MessageDict) -> bool:
        try:
            return PROBE in self.write([message], {})
        except FAILURES:
            return False


@dataclass(frozen=True)
class ChatTemplate:
    """The template of a model, and the one for conversations with tools if it has one of its own."""

    plain: CompiledTemplate | BrokenTemplate
    with_tools: CompiledTemplate | BrokenTemplate | None = None

    @property
    def source(self) -> str:
        """Text of the template that writes tools, or an empty text if it does not compile."""
        template = self.with_tools or self.plain
        return template.source if isinstance(template, CompiledTemplate) else ""

    @property
    def writes_tools(self) -> bool:
        """Whether the template for tools writes them, so that the model knows them."""
        template = self.with_tools or self.plain
        return isinstance(template, CompiledTemplate) and template.writes_tools

    def render(
        self,
        messages: Sequence[MessageDict],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
    ) -> str:
        """Return the conversation as text.  Raises BadRequest if it is invalid, or if the template refuses it.

        `tools` are OpenAI's objects, `template_kwargs` variables of the template.  With `continue_final_message` the
        text ends where the last message's content, or the field of that name, ends, so that the model continues it.
        """
        check_messages(messages)
        template = self.plain if tools is None or self.with_tools is None else self.with_tools
        if isinstance(template, BrokenTemplate):
            raise BadRequest(f"{template.problem}: this model only continues texts, as `swarm generate` does")
        for name in template_kwargs or {}:
            if name in RESERVED:
                raise BadRequest(f"'{name}' is no variable of a chat template: give it as an argument of its own")
        variables = {
            **plain_value(dict(template_kwargs or {})),
            "tools": plain_value(tools),
            "documents": plain_value(documents),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        field = "content" if continue_final_message is True else continue_final_message or ""
        try:
            return _render_in_best_form(template, prepare_messages(messages), variables, field)
        except FAILURES as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}") from None


def _render_in_best_form(
    template: CompiledTemplate, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any], field: str
) -> str:
    """Render in the first form that the template takes; see `wanted_forms`.  Raises BadRequest and FAILURES."""
    refusal: Exception | None = None
    as_python: str | None = None
    for form in wanted_forms(messages):
        try:
            text = _render(template, form.messages, variables, field)
            if form.filled and PROBE not in _render(template, with_call_names(form.messages, PROBE), variables, field):
                continue  # the message has no text of its own, and the template leaves out its calls
        except FAILURES as error:
            refusal = refusal or error
            continue
        if not written_as_python(form.messages, text):
            return text
        as_python = as_python or text
    if as_python is not None:
        return as_python
    raise refusal or ValueError("it writes no tool calls")


def _render(
    template: CompiledTemplate, messages: Sequence[MessageDict], variables: Mapping[str, Any], field: str
) -> str:
    if template.takes_parts:
        messages = [_in_parts(message) for message in messages]
    if not field:
        return template.write(messages, variables)
    messages, ending = _mark_end(messages, field, template.source)
    text = template.write(messages, variables)
    if ending.strip() not in text or END_MARK.strip() not in text:
        raise ValueError(f"it leaves out the end of the last message's {field}, which thus cannot be continued")
    end = text.rindex(END_MARK.strip())
    if text[end : end + len(END_MARK)] == END_MARK:
        return text[:end]
    return text[:end].rstrip()  # the template strips messages


def _mark_end(messages: Sequence[MessageDict], field: str, source: str) -> tuple[list[MessageDict], str]:
    """Return the messages with a mark at the end of the last one's field, and the text before that mark."""
    last = dict(messages[-1])
    value = last.get(field)
    names = [name for name in REASONING_NAMES if last.get(name) == value] if field in REASONING_NAMES else [field]
    if value is None:
        raise BadRequest(f"the last message has no {field} that could be continued")
    if not any(name in source for name in names):
        raise BadRequest(f"the model's chat template does not read {field}, so that nothing of it could be continued")
    if isinstance(value, str):
        return [*messages[:-1], {**last, **dict.fromkeys(names, value + END_MARK)}], value
    parts = [dict(part) for part in value]
    at = next((index for index in reversed(range(len(parts))) if "text" in parts[index]), None)
    if at is None:
        raise BadRequest(f"the last message's {field} has no text that could be continued")
    ending = parts[at]["text"]
    parts[at]["text"] = ending + END_MARK
    return [*messages[:-1], {**last, field: parts}], ending


def _in_parts(message: MessageDict) -> MessageDict:
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
