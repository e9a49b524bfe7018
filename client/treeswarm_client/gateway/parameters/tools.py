"""The parameters that offer tools, and those inside them.  Pure."""

import re
from typing import Any

from treeswarm_client.gateway.generation_request import InvalidParameter, Unsupported
from treeswarm_client.gateway.parameters.checks import AnyObject, ByFunction, ListOf, Text, TrueOrFalse, quote
from treeswarm_client.gateway.parameters.parameter import EVERY_API, Fields, Parameter, read_parameters

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

# Tools of responses have their function's fields themselves; other types are run by OpenAI.
FLAT_TOOL = (Parameter("type", EVERY_API, "`function`", Text(), required=True), *FUNCTION)
ANTHROPIC_TOOL = (
    *(parameter for parameter in FUNCTION if parameter.name in ("name", "description")),
    Parameter(
        "input_schema", EVERY_API, "JSON schema of its arguments", ByFunction(read_tool_schema, {"type": "object"})
    ),
    Parameter("type", EVERY_API, "tools that Anthropic runs are not served", neutral=("custom",)),
    Parameter("cache_control", EVERY_API, "nodes keep what they have computed by themselves", neutral=None),
    Parameter("eager_input_streaming", EVERY_API, "arguments are streamed anyway", neutral=None),
    Parameter("strict", EVERY_API, "arguments are as the model writes them", neutral=None),
    Parameter("defer_loading", EVERY_API, "every tool is described to the model", neutral=(False,)),
    Parameter("input_examples", EVERY_API, "describe them in words", neutral=([],)),
)
THINKING = (
    Parameter("type", EVERY_API, "`disabled` or `adaptive`", Text(("disabled", "adaptive")), required=True),
    Parameter("display", EVERY_API, "thoughts are sent as they are", neutral=("summarized",)),
)


def read_flat_tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the tools of a response as those of a chat.  Raises InvalidParameter and Unsupported."""
    tools = []
    for at, one in enumerate(ListOf(AnyObject(), "tools", MAX_TOOLS)(name, value)):
        path = f"{name}[{at}]"
        if (kind := one.get("type")) != "function":
            raise Unsupported(path, f"{path} has the type {quote(kind)}: the gateway runs no tools, give functions")
        fields = read_parameters(one, FLAT_TOOL, path)
        tools.append({"type": fields.pop("type"), "function": fields})
    return read_tools(name, tools)


def read_flat_choice(name: str, value: Any) -> tuple[str, str | None]:
    """Return the mode and the function that must be called, of a response.  Raises InvalidParameter and Unsupported."""
    if isinstance(value, dict) and value.get("type") == "function" and "name" in value:
        return "required", read_tool_name(f"{name}.name", value["name"])
    return read_tool_choice(name, value)


def read_anthropic_tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Return Anthropic's tools as those of a chat.  Raises InvalidParameter and Unsupported."""
    tools = []
    for at, one in enumerate(ListOf(Fields(ANTHROPIC_TOOL), "tools", MAX_TOOLS)(name, value)):
        if "input_schema" not in one:
            raise InvalidParameter(f"{name}[{at}].input_schema", f"{name}[{at}].input_schema is missing")
        function = {field: one[field] for field in ("name", "description") if field in one}
        tools.append({"type": "function", "function": {**function, "parameters": one["input_schema"]}})
    return read_tools(name, tools)


def read_anthropic_choice(name: str, value: Any) -> tuple[str, str | None, bool]:
    """Return the mode, the tool that must be called, and whether several may be.  Raises InvalidParameter."""
    fields = read_parameters(AnyObject()(name, value), ANTHROPIC_CHOICE, name)
    tool = fields.get("name")
    if (fields["type"] == "tool") != (tool is not None):
        raise InvalidParameter(f"{name}.name", f"{name}.name is the tool's name with type tool, and nothing else")
    return ANTHROPIC_MODES[fields["type"]], tool, not fields.get("disable_parallel_tool_use", False)


def read_thinking(name: str, value: Any) -> str | None:
    """Return OpenAI's word for how much the model thinks, or None if it decides.  Raises what checks raise."""
    if AnyObject()(name, value).get("type") == "enabled":
        raise Unsupported(name, f"{name} is enabled with a budget, which nodes do not keep: give adaptive or disabled")
    return "none" if read_parameters(value, THINKING, name)["type"] == "disabled" else None


ANTHROPIC_MODES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
ANTHROPIC_CHOICE = (
    Parameter("type", EVERY_API, "`auto`, `any`, `tool` or `none`", Text(tuple(ANTHROPIC_MODES)), required=True),
    Parameter("name", EVERY_API, "the tool that is called", ByFunction(read_tool_name, {"type": "string"})),
    Parameter("disable_parallel_tool_use", EVERY_API, "whether only one tool is called", TrueOrFalse()),
)
_LIST = {"type": "array", "maxItems": MAX_TOOLS}
FLAT_TOOLS = ByFunction(read_flat_tools, {**_LIST, "items": Fields(FLAT_TOOL).schema})
FLAT_CHOICE = ByFunction(read_flat_choice, TOOL_CHOICE.schema)
ANTHROPIC_TOOLS = ByFunction(read_anthropic_tools, {**_LIST, "items": Fields(ANTHROPIC_TOOL).schema})
ANTHROPIC_CHOICES = ByFunction(read_anthropic_choice, Fields(ANTHROPIC_CHOICE).schema)
ANTHROPIC_THINKING = ByFunction(read_thinking, Fields(THINKING).schema)
