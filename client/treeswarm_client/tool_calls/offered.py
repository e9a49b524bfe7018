"""The tools that a request offers, and the types of their parameters."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Number of references that are followed from one schema to the next; more are a circle.
LONGEST_CHAIN = 8
# How models write what JSON writes as true, false and null.
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


@dataclass(frozen=True)
class OfferedTools:
    """Functions that the model may call, by name, with the JSON schemas of their parameters."""

    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]]) -> "OfferedTools":
        """Make it from OpenAI's objects, which are known to be valid."""
        functions = [tool["function"] for tool in tools]
        return cls({function["name"]: function.get("parameters") or {} for function in functions})

    def types(self, tool: str, parameter: str) -> tuple[str, ...]:
        """Return the types that a parameter may have, in the schema's order; none if its schema does not say."""
        root = self.schemas.get(tool, {})
        properties = root.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return _types(schema, root)

    def is_text(self, tool: str, parameter: str) -> bool:
        """Return whether a parameter is text, whatever the model writes."""
        return self.types(tool, parameter) in (("string",), ())

    def value(self, tool: str, parameter: str, written: str) -> Any:
        """Return the value of a parameter that the model wrote as text without quotes."""
        for kind in self.types(tool, parameter):
            for value in _read_as(kind, written.strip()):
                return value
        return written


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> tuple[str, ...]:
    if not isinstance(schema, Mapping) or depth > LONGEST_CHAIN:
        return ()
    if isinstance(target := schema.get("$ref"), str):
        return _types(_resolve(target, root), root, depth + 1)
    declared = schema.get("type")
    kinds = [declared] if isinstance(declared, str) else [kind for kind in declared or () if isinstance(kind, str)]
    for union in ("anyOf", "oneOf", "allOf"):
        for choice in schema.get(union) or ():
            kinds += _types(choice, root, depth + 1)
    if not kinds:
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        kinds = [_kind_of(value) for value in values] if isinstance(values, list) else []
    return tuple(dict.fromkeys(kinds))


def _resolve(target: str, root: Mapping[str, Any]) -> Any:
    """Return the schema that a reference within the same document names, or None."""
    place: Any = root
    for name in target.removeprefix("#/").split("/"):
        place = place.get(name) if isinstance(place, Mapping) else None
    return place


def _kind_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return kinds.get(type(value), "null")


def _read_as(kind: str, text: str) -> Sequence[Any]:
    """Return the value of this kind that a text writes, or nothing if it writes none."""
    match kind:
        case "boolean" | "null":
            is_wanted = text in WORDS and (WORDS[text] is None) == (kind == "null")
            return (WORDS[text],) if is_wanted else ()
        case "integer" | "number":
            return _read_number(text, whole=kind == "integer")
        case "object" | "array":
            try:
                value = json.loads(text)
            except ValueError:
                return ()
            return (value,) if isinstance(value, dict if kind == "object" else list) else ()
    return ()


def _read_number(text: str, *, whole: bool) -> Sequence[int | float]:
    try:
        return (int(text),)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return ()
    if not math.isfinite(number):
        return ()
    if whole:
        return (int(number),) if number.is_integer() else ()
    return (number,)
