"""The parameters inside messages, their parts and `stream_options`.  Pure."""

from typing import Any

from treeswarm.protocol.text_rules import MAX_BIAS
from treeswarm_client.chat_template.messages import REASONING_NAMES, ROLES
from treeswarm_client.gateway.generation_request import InvalidParameter, Unsupported
from treeswarm_client.gateway.parameters.checks import AnyObject, ByFunction, ListOf, Number, Text, TrueOrFalse, quote
from treeswarm_client.gateway.parameters.parameter import EVERY_API, Fields, Parameter, read_parameters

MAX_MESSAGES = 4096
MAX_PARTS = 1024
# Types of a part with text, in the four APIs.
TEXT_PARTS = ("text", "input_text", "output_text")

PART = (
    Parameter("type", EVERY_API, "kind of the part: `text`, no other", Text(), required=True),
    Parameter("text", EVERY_API, "its text", Text(), required=True),
    Parameter("cache_control", EVERY_API, "nodes keep what they have computed by themselves", neutral=None),
    Parameter("prompt_cache_breakpoint", EVERY_API, "nodes keep what they have computed by themselves", neutral=None),
    Parameter("annotations", EVERY_API, "the model reads text only", neutral=([],)),
    Parameter("citations", EVERY_API, "the model reads text only", neutral=([],)),
    Parameter("logprobs", EVERY_API, "those of an earlier answer do not change the next one", neutral=None),
)


def read_part(name: str, value: Any) -> str:
    """Return the text of one part of a message.  Raises InvalidParameter and Unsupported."""
    kind = AnyObject()(name, value).get("type")
    if isinstance(kind, str) and kind not in TEXT_PARTS:
        raise Unsupported(name, f"{name} has the type {quote(kind)}, which cannot be honoured: this model reads text")
    return str(read_parameters(value, PART, name)["text"])


def read_content(name: str, value: Any) -> str:
    """Return the text of a message, which is given as text or in parts.  Raises InvalidParameter and Unsupported."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidParameter(name, f"{name} is {quote(value)}: give a text or a list of parts")
    return "".join(ListOf(ByFunction(read_part, {}), "parts", MAX_PARTS)(name, value))


def read_logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Return token ids with their biases, from an object that names the ids.  Raises InvalidParameter."""
    biases: dict[int, float] = {}
    for token, bias in AnyObject()(name, value).items():
        if not (token.isascii() and token.isdecimal()):
            raise InvalidParameter(name, f"{name} names {quote(token)}, which is no token id: give numbers as names")
        biases[int(token)] = Number(-MAX_BIAS, MAX_BIAS)(f"{name}.{int(token)}", bias)
    return tuple(sorted(biases.items()))


PART_SCHEMA = Fields(PART).schema
CONTENT = ByFunction(
    read_content,
    {"anyOf": [{"type": "string"}, {"type": "array", "items": PART_SCHEMA, "maxItems": MAX_PARTS}]},
)

MESSAGE = (
    Parameter("role", EVERY_API, f"one of {', '.join(f'`{role}`' for role in ROLES)}", Text(ROLES), required=True),
    Parameter("content", EVERY_API, "text, or parts of type `text`", CONTENT),
    Parameter("name", EVERY_API, "passed to the model's template", Text()),
    Parameter(
        "tool_calls",
        EVERY_API,
        "calls that the assistant made, passed to the model's template",
        ListOf(AnyObject(), "calls", MAX_PARTS),
    ),
    Parameter("tool_call_id", EVERY_API, "call that a message of role `tool` answers", Text()),
    *(Parameter(name, EVERY_API, "the assistant's thoughts, for the template", Text()) for name in REASONING_NAMES),
    Parameter("refusal", EVERY_API, "write what the assistant said into `content`", neutral=("",)),
    Parameter("audio", EVERY_API, "the model reads text only"),
    Parameter("annotations", EVERY_API, "the model reads text only", neutral=([],)),
    Parameter("function_call", EVERY_API, "use tool_calls"),
    Parameter("cache_control", EVERY_API, "nodes keep what they have computed by themselves", neutral=None),
)

STREAM_OPTIONS = (
    Parameter("include_usage", EVERY_API, "whether the stream ends with a chunk that counts the tokens", TrueOrFalse()),
    Parameter("include_traversals", EVERY_API, "whether chunks say which traversal brought them", TrueOrFalse()),
    Parameter("include_obfuscation", EVERY_API, "the padding changes no text", neutral=None),
    Parameter("continuous_usage_stats", EVERY_API, "ask for include_usage", neutral=(False,)),
)

MESSAGES = ListOf(Fields(MESSAGE), "messages", MAX_MESSAGES, least=1)
STOPS = ListOf(Text(longest=256), "stop strings", 16, or_one=True)
LOGIT_BIAS = ByFunction(
    read_logit_bias,
    {"type": "object", "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS}},
)
