"""Structured output in the requests of every API, translated into the one kind of grammar that tails follow."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from treeswarm.errors import BadRequest
from treeswarm.grammar.notation import lark_from
from treeswarm.protocol.text_rules import Grammar, GrammarKind
from treeswarm_client.gateway.generation_request import InvalidParameter, Unsupported
from treeswarm_client.gateway.parameters.checks import AnyObject, ByFunction, TrueOrFalse, quote

# Parameters whose values are grammars once they are checked; a request has one of them at most.
GRAMMARS = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "grammar", "json_schema", "text", "output_config", "output_format",
)  # fmt: skip
FORMATS = ("text", "json_object", "json_schema")
# Members of vLLM's `structured_outputs` that change no text at these values.
NEUTRAL_MEMBERS: Mapping[str, Any] = {
    "disable_fallback": False, "disable_any_whitespace": False, "disable_additional_properties": False,
    "json_object": False,
}  # fmt: skip


def grammar_of(values: Mapping[str, Any]) -> Grammar | None:
    """Return the grammar that a request's checked parameters ask for, or None.  Raises Unsupported for several."""
    given = [name for name in GRAMMARS if values.get(name) is not None]
    if len(given) > 1:
        raise Unsupported(given[1], f"{given[0]} and {given[1]} both say how the text is formed: give one of them")
    found: Grammar | None = values[given[0]] if given else None
    return found


def read_format(name: str, value: Any) -> Grammar | None:
    """Return the grammar of OpenAI's `response_format`, or of the format of a response or message, or None for text.

    Raises InvalidParameter and Unsupported.
    """
    given = AnyObject()(name, value)
    if (kind := given.get("type")) not in FORMATS:
        raise Unsupported(f"{name}.type", f"{name}.type is {quote(kind)}: give {', '.join(map(quote, FORMATS))}")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    # Chats name the schema in an object of its own, responses and messages beside the type.
    place, holder = (name, given) if "schema" in given else (f"{name}.json_schema", given.get("json_schema"))
    holder = AnyObject()(place, holder)
    if holder.get("schema") is None:
        raise InvalidParameter(f"{place}.schema", f"{place}.schema is missing: give a JSON schema")
    return read_json(f"{place}.schema", holder["schema"])


def read_text(name: str, value: Any) -> Grammar | None:
    """Return the grammar of a response's `text` or of Anthropic's `output_config`, or None for text."""
    given = AnyObject()(name, value)
    for member, inner in given.items():
        if member != "format" and not (inner is None or (member, inner) == ("verbosity", "medium")):
            raise Unsupported(f"{name}.{member}", f"{name}.{member} cannot be honoured: leave it out")
    return None if given.get("format") is None else read_format(f"{name}.format", given["format"])


def read_structured_outputs(name: str, value: Any) -> Grammar | None:
    """Return the grammar of vLLM's `structured_outputs`, or None.  Raises InvalidParameter and Unsupported."""
    given = {member: inner for member, inner in AnyObject()(name, value).items() if inner is not None}
    readers = {"json": read_json, "regex": read_regex, "choice": read_choice, "grammar": read_grammar}
    found: list[Grammar] = []
    for member, inner in given.items():
        place = f"{name}.{member}"
        if member in readers:
            found.append(readers[member](place, inner))
        elif member == "json_object" and TrueOrFalse()(place, inner):
            found.append(Grammar("json_object"))
        elif NEUTRAL_MEMBERS.get(member) != inner:
            raise Unsupported(place, f"{place} is {quote(inner)}, which cannot be honoured: leave it out")
    if len(found) > 1:
        raise InvalidParameter(name, f"{name} has {len(found)} grammars: give one")
    return found[0] if found else None


def read_json(name: str, value: Any) -> Grammar:
    """Return the grammar of a JSON schema, given as an object or as a text of JSON.  Raises InvalidParameter."""
    if not isinstance(value, dict | bool | str):
        raise InvalidParameter(name, f"{name} is {quote(value)}: give a JSON schema")
    return _grammar(name, "json_schema", value if isinstance(value, str) else json.dumps(value))


def read_regex(name: str, value: Any) -> Grammar:
    """Return the grammar of a regular expression.  Raises InvalidParameter."""
    return _grammar(name, "regex", _text(name, value))


def read_choice(name: str, value: Any) -> Grammar:
    """Return the grammar of a list of texts.  Raises InvalidParameter."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InvalidParameter(name, f"{name} is {quote(value)}: give a list of texts")
    return _grammar(name, "choice", json.dumps([_text(f"{name}[{at}]", one) for at, one in enumerate(value)]))


def read_grammar(name: str, value: Any) -> Grammar:
    """Return a grammar in Lark's or in llama.cpp's notation.  Raises InvalidParameter."""
    try:
        return _grammar(name, "lark", lark_from(_text(name, value)))
    except BadRequest as error:
        raise InvalidParameter(name, f"{name}: {error}") from None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidParameter(name, f"{name} is {quote(value)}: give a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may bring it
        raise InvalidParameter(name, f"{name} contains lone surrogates, which are no characters") from None
    return value


def _grammar(name: str, kind: GrammarKind, text: str) -> Grammar:
    try:
        return Grammar(kind, text)
    except BadRequest as error:
        raise InvalidParameter(name, f"{name}: {error}") from None


FORMAT = ByFunction(read_format, {"type": "object", "properties": {"type": {"type": "string", "enum": list(FORMATS)}}})
FORMAT_HOLDER = ByFunction(read_text, {"type": "object", "properties": {"format": FORMAT.schema}})
STRUCTURED_OUTPUTS = ByFunction(
    read_structured_outputs,
    {
        "type": "object",
        "properties": {
            "json": {"anyOf": [{"type": "object"}, {"type": "string"}]},
            "regex": {"type": "string"},
            "choice": {"type": "array", "items": {"type": "string"}},
            "grammar": {"type": "string"},
            "json_object": {"type": "boolean"},
        },
    },
)
# Checked values are grammars, so no type is named that a value would have to be of.
JSON_SCHEMA = ByFunction(read_json, {"anyOf": [{"type": "object"}, {"type": "string"}]})
REGEX = ByFunction(read_regex, {"anyOf": [{"type": "string"}]})
CHOICE = ByFunction(read_choice, {"type": "array", "items": {"type": "string"}})
GRAMMAR = ByFunction(read_grammar, {"anyOf": [{"type": "string"}]})
