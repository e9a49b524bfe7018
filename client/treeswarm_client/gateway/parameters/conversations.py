"""The conversations of Anthropic's messages and of OpenAI's responses, as messages of a chat.  Pure."""

import json
from typing import Any

from treeswarm_client.gateway.generation_request import InvalidParameter, Unsupported
from treeswarm_client.gateway.parameters.checks import AnyObject, ByFunction, ListOf, Text, quote
from treeswarm_client.gateway.parameters.nested import CONTENT, MAX_MESSAGES, MAX_PARTS, PART_SCHEMA
from treeswarm_client.gateway.parameters.parameter import EVERY_API, Parameter, read_parameters

Message = dict[str, Any]
_IGNORED = "says nothing to the model"


def _ignored(*names: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(name, EVERY_API, _IGNORED, neutral=None) for name in names)


MESSAGE = (
    Parameter("role", EVERY_API, "`user` or `assistant`", Text(("user", "assistant", "system")), required=True),
    Parameter("content", EVERY_API, "text, or blocks", ByFunction(lambda _, value: value, {}), required=True),
)
BLOCKS: dict[str, tuple[Parameter, ...]] = {
    "text": (
        Parameter("text", EVERY_API, "its text", Text(), required=True),
        *_ignored("type", "cache_control", "citations"),
    ),
    "thinking": (
        Parameter("thinking", EVERY_API, "what the assistant thought", Text(), required=True),
        *_ignored("type", "signature", "cache_control"),
    ),
    "tool_use": (
        Parameter("id", EVERY_API, "the call's id", Text(), required=True),
        Parameter("name", EVERY_API, "the tool's name", Text(), required=True),
        Parameter("input", EVERY_API, "the arguments", AnyObject(), required=True),
        *_ignored("type", "cache_control", "caller"),
    ),
    "tool_result": (
        Parameter("tool_use_id", EVERY_API, "the call's id", Text(), required=True),
        Parameter("content", EVERY_API, "what the tool answered", CONTENT),
        *_ignored("type", "cache_control", "is_error"),
    ),
}
"""Kinds of blocks of Anthropic's messages, with their fields."""
ITEMS: dict[str, tuple[Parameter, ...]] = {
    "message": (
        Parameter("role", EVERY_API, "who speaks", Text(("user", "assistant", "system", "developer")), required=True),
        Parameter("content", EVERY_API, "the text", CONTENT, required=True),
        *_ignored("type", "id", "status", "phase"),
    ),
    "function_call": (
        Parameter("call_id", EVERY_API, "the call's id", Text(), required=True),
        Parameter("name", EVERY_API, "the tool's name", Text(), required=True),
        Parameter("arguments", EVERY_API, "the arguments as JSON", Text(), required=True),
        *_ignored("type", "id", "status", "namespace", "caller"),
    ),
    "function_call_output": (
        Parameter("call_id", EVERY_API, "the call's id", Text(), required=True),
        Parameter("output", EVERY_API, "what the tool answered", CONTENT, required=True),
        *_ignored("type", "id", "status", "caller"),
    ),
    "reasoning": (
        Parameter("content", EVERY_API, "what the assistant thought", ListOf(AnyObject(), "parts", MAX_PARTS)),
        *_ignored("type", "id", "status", "summary", "encrypted_content"),
    ),
}
"""Kinds of items of a response's input, with their fields."""


def read_blocks(name: str, value: Any) -> list[Message]:
    """Return the messages of a chat for Anthropic's.  Raises InvalidParameter and Unsupported."""
    messages: list[Message] = []
    for at, item in enumerate(ListOf(AnyObject(), "messages", MAX_MESSAGES, least=1)(name, value)):
        path = f"{name}[{at}]"
        message = read_parameters(item, MESSAGE, path)
        role, content = message["role"], message["content"]
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
            continue
        blocks = ListOf(ByFunction(_block, {}), "blocks", MAX_PARTS)(f"{path}.content", content)
        messages += _messages_of(role, blocks, path)
    return messages


def read_input(name: str, value: Any) -> list[Message]:
    """Return the messages of a chat for a response's input.  Raises InvalidParameter and Unsupported."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    said: list[Message] = []
    items = ListOf(AnyObject(), "items", MAX_MESSAGES, least=1)(name, value)
    for at, item in enumerate(items):
        kind = item.get("type", "message")
        fields = _fields(ITEMS, kind, item, f"{name}[{at}]")
        _add_item(said, kind, fields)
    if not said or not (said[-1].keys() & {"content", "tool_calls"}):
        raise InvalidParameter(name, f"{name} ends with reasoning alone: end with a message")
    return said


def parse_arguments(text: str) -> Any:
    """Return a call's arguments, which are JSON, as an object: an empty one if they cannot be read."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _block(name: str, value: Any) -> Message:
    kind = AnyObject()(name, value).get("type")
    return {**_fields(BLOCKS, kind, value, name), "type": kind}


def _fields(tables: dict[str, tuple[Parameter, ...]], kind: Any, value: Message, path: str) -> Message:
    if not isinstance(kind, str):
        raise InvalidParameter(f"{path}.type", f"{path}.type is {quote(kind)}: give {' or '.join(tables)}")
    if kind not in tables:
        raise Unsupported(path, f"{path} has the type {quote(kind)}, which cannot be honoured: this model reads text")
    return read_parameters(value, tables[kind], path)


def _messages_of(role: str, blocks: list[Message], path: str) -> list[Message]:
    """Return the messages for one whose content is in blocks: results of tools are messages of their own."""
    results: list[Message] = []
    message: Message = {"role": role}
    for block in blocks:
        match block["type"]:
            case "text":
                message["content"] = message.get("content", "") + block["text"]
            case "thinking" if role == "assistant":
                message["reasoning_content"] = message.get("reasoning_content", "") + block["thinking"]
            case "tool_use" if role == "assistant":
                message.setdefault("tool_calls", []).append(
                    _call(block["id"], block["name"], json.dumps(block["input"], ensure_ascii=False))
                )
            case "tool_result" if role == "user":
                results.append(
                    {"role": "tool", "content": block.get("content", ""), "tool_call_id": block["tool_use_id"]}
                )
            case kind:
                raise InvalidParameter(path, f"{path} of role {role} has a block of type {kind}, which it cannot have")
    if len(message) > 1:
        results.append(message)
    if not results:
        raise InvalidParameter(f"{path}.content", f"{path}.content is empty: give the message's text")
    return results


def _add_item(said: list[Message], kind: str, fields: Message) -> None:
    """Add one item to a conversation; the assistant's thoughts, text and calls in a row are one message."""
    last = said[-1] if said and said[-1]["role"] == "assistant" else None
    match kind:
        case "message":
            role = "system" if fields["role"] == "developer" else fields["role"]
            if role == "assistant" and last is not None and "content" not in last and "tool_calls" not in last:
                last["content"] = fields["content"]
            else:
                said.append({"role": role, "content": fields["content"]})
        case "function_call":
            call = _call(fields["call_id"], fields["name"], fields["arguments"])
            if last is None:
                said.append(last := {"role": "assistant"})
            last.setdefault("tool_calls", []).append(call)
        case "function_call_output":
            said.append({"role": "tool", "content": fields["output"], "tool_call_id": fields["call_id"]})
        case "reasoning":
            thoughts = "".join(str(part.get("text", "")) for part in fields.get("content", ()))
            if thoughts:
                said.append({"role": "assistant", "reasoning_content": thoughts})


def _call(call_id: str, name: str, arguments: str) -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _list_schema(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "maxItems": MAX_MESSAGES}


_SPOKEN = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "description": "who speaks: `user` or `assistant`"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": PART_SCHEMA}], "description": "the text"},
    },
    "required": ["role", "content"],
}
ANTHROPIC_MESSAGES = ByFunction(read_blocks, _list_schema(_SPOKEN))
INPUT = ByFunction(read_input, {"anyOf": [{"type": "string"}, _list_schema(_SPOKEN)]})
