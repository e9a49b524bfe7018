"""Tools for models whose chat template knows none: they are described in the system message.  Pure.

The words are ours, the form is the one that most families were trained on: JSON within `<tool_call>` tags.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

INTRODUCTION = """You may call functions to answer. They are described here, one JSON object per line:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as a JSON object in these tags, and nothing after them:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>
What a function returned comes in <tool_response> tags."""


def describe_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages that describe the tools, and in which earlier calls and their results are texts."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    about = INTRODUCTION.format(tools=lines)
    written = [_as_text(message) for message in messages]
    if written and written[0]["role"] == "system":
        return [{**written[0], "content": f"{written[0]['content']}\n\n{about}"}, *written[1:]]
    return [{"role": "system", "content": about}, *written]


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    text = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    calls = [_call_text(call.get("function", call)) for call in message.get("tool_calls") or ()]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join([text, *calls] if text else calls)} if calls else rest


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {text}}}\n</tool_call>'
