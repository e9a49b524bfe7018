"""Messages of a conversation in the forms that chat templates read.  Pure."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from treeswarm.errors import BadRequest

MessageDict = Mapping[str, Any]
"""A message, with `role` and `content` at least; one of the assistant may have tool calls or reasoning instead."""
ROLES = ("system", "developer", "user", "assistant", "tool")
# Names under which programs send what a model thought; templates read the first, those of gpt-oss the second.
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


def check_messages(messages: Sequence[MessageDict]) -> None:
    """Raise BadRequest unless these are messages with known roles, whose content is text."""
    if not messages:
        raise BadRequest("there are no messages: give at least one of role user")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadRequest(f"every message needs a role, one of {', '.join(ROLES)}")
        role, content = message["role"], message.get("content")
        if not isinstance(content, str) and not (content is None and role == "assistant"):
            raise BadRequest(f"the content of a message of role {role} is not text")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, Sequence) and all(map(_is_call, calls))):
            raise BadRequest(f"tool_calls of a message of role {role} must be a list of objects with a function")


def prepare_messages(messages: Sequence[MessageDict]) -> list[dict[str, Any]]:
    """Return messages as transformers hands them to a template: no field is none, reasoning has all its names.

    The arguments of earlier tool calls become objects: OpenAI's messages have them as text.
    """
    prepared = []
    for message in messages:
        fields = plain_value({name: value for name, value in message.items() if value is not None})
        reasoning = next((fields[name] for name in REASONING_NAMES if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        prepared.append(_with_calls(fields, _as_object))
    return prepared


@dataclass(frozen=True)
class MessageForm:
    """One form of the messages that a template may want."""

    messages: list[dict[str, Any]]
    filled: bool
    """Whether messages without content were given an empty one."""


def wanted_forms(messages: Sequence[dict[str, Any]]) -> Iterator[MessageForm]:
    """Yield the messages in the forms that a template may want, the likeliest first.

    Most templates write a call's arguments themselves, from an object; DeepSeek-V3's joins them to its own text.  Some
    read the content of a message that only calls tools, which OpenAI's messages leave out.
    """
    has_calls = any(message.get("tool_calls") for message in messages)
    lacks_content = any("content" not in message for message in messages)
    for filled, as_text in product((False, True)[: 1 + lacks_content], (False, True)[: 1 + has_calls]):
        form = [_with_calls(message, _as_text) if as_text else message for message in messages]
        yield MessageForm([{"content": "", **message} for message in form] if filled else form, filled)


def with_call_names(messages: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return messages all of whose calls are of the function `name`."""

    def renamed(call: dict[str, Any]) -> dict[str, Any]:
        return (
            {**call, "function": {**call["function"], "name": name}} if "function" in call else {**call, "name": name}
        )

    return [
        {**message, "tool_calls": [renamed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def written_as_python(messages: Sequence[dict[str, Any]], text: str) -> bool:
    """Return whether a template wrote arguments as Python writes a dict, which no model was trained on."""
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    arguments = (call.get("function", call).get("arguments") for call in calls)
    return any(isinstance(value, dict) and value and repr(value) in text for value in arguments)


def plain_value(value: Any) -> Any:
    """Return a copy made of JSON's own types.  Raises BadRequest: templates must see no object with methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    raise BadRequest(f"a value of type {type(value).__name__} is no JSON: chat templates read JSON alone")


def _is_call(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping)


def _with_calls(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_arguments(call, change) for call in message["tool_calls"]]}


def _with_arguments(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    """Return arguments as an object; text that holds none stays, so that the model sees what it wrote."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
