"""The parameters that offer tools, and those inside them.  Pure."""

import re
from typing import Any

from treeswarm_client.gateway.generation_request import InvalidParameter, Unsupported
from treeswarm_client.gateway.parameters.checks import AnyObject, ByFunction, ListOf, Text, quote
from treeswarm_client.gateway.parameters.parameter import EVERY_API, Fields, Parameter

MAX_TOOLS = 128
TOOL_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
TOOL_CHOICES = ("auto", "none", "required")


def read_tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the tools of a request.  Raises InvalidParameter and Unsupported."""
    tools: list[dict[str, Any]] = ListOf(Fields(TOOL), "tools", MAX_TOOLS)(name, value)
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((one for at, one in enumerate(names) if one in names[:at]), None):
        raise InvalidParameter(name, f"{name} has two functions named {quote(twice)}: give each a name of its own")
    return tools


def read_tool_name(name: str, value: Any) -> str:
    """Return the name of a function.  Raises InvalidParameter."""
    if not isinstance(value, str) or not TOOL_NAME.fullmatch(value):
        raise InvalidParameter(name, f"{name} is {quote(value)}: give 1 to 64 letters, digits, `_`, `-` or `.`")
    return value


def read_tool_schema(name: str, value: Any) -> dict[str, Any]:
    """Return the JSON schema of a function's arguments.  Raises InvalidParameter."""
    schema = AnyObject()(name, value)
    if schema and schema.get("type", "object") != "object":
        raise InvalidParameter(f"{name}.type", f"{name}.type is {quote(schema['type'])}: arguments are an object")
    if not isinstance(properties := schema.get("properties", {}), dict):
        raise InvalidParameter(f"{name}.properties", f"{name}.properties is {quote(properties)}: give an object")
    for key, one in properties.items():
        if not isinstance(one, dict | bool):
            raise InvalidParameter(f"{name}.properties", f"{name}.properties.{quote(key)[1:-1]} is no JSON schema")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        raise InvalidParameter(f"{name}.required", f"{name}.required is {quote(required)}: give a list of names")
    return schema


def read_tool_choice(name: str, value: Any) -> tuple[str, str | None]:
    """Return the mode, and the name of the function that must be called or None.

    Raises InvalidParameter and Unsupported.
    """
    if isinstance(value, str):
        return Text(TOOL_CHOICES)(name, value), None
    chosen = AnyObject()(name, value)
    if chosen.get("type", "function") != "function":
        raise Unsupported(f"{name}.type", f'{name}.type is {quote(chosen["type"])}: give "function"')
    function = AnyObject()(f"{name}.function", chosen.get("function"))
    return "required", read_tool_name(f"{name}.function.name", function.get("name"))


FUNCTION = (
    Parameter(
        "name",
        EVERY_API,
        "its name: letters, digits, `_`, `-` and `.`",
        ByFunction(read_tool_name, {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}),
        required=True,
    ),
    Parameter("description", EVERY_API, "what it does, for the model", Text()),
    Parameter(
        "parameters",
        EVERY_API,
        "JSON schema of its arguments, an object",
        ByFunction(read_tool_schema, {"type": "object"}),
    ),
    Parameter("strict", EVERY_API, "arguments are as the model writes them", neutral=None),
)
TOOL = (
    Parameter("type", EVERY_API, "`function`", Text(("function",)), required=True),
    Parameter("function", EVERY_API, "the function", Fields(FUNCTION), required=True),
)
TOOLS = ByFunction(read_tools, {"type": "array", "items": Fields(TOOL).schema, "maxItems": MAX_TOOLS})
TOOL_CHOICE = ByFunction(
    read_tool_choice, {"anyOf": [{"type": "string", "enum": list(TOOL_CHOICES)}, {"type": "object"}]}
)
