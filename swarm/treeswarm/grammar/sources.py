"""Grammars as llguidance reads them, and the bounds of what a stranger may ask for."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher

from treeswarm.errors import BadRequest
from treeswarm.protocol.text_rules import Grammar

# JSON is written as `json.dumps` writes it: one line, a space after commas and colons.  Free white space would let a
# small model write line breaks up to its limit of tokens, and no token would be forced.  A schema may choose other
# forms by its own `x-guidance` member.
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# A multiple of M is recognised by one state per remainder.  100,000 took 4 ms per mask and 1,000,003 more than 8 s,
# which none of the library's own limits ended (Xeon at 2.1 GHz, 49k tokens, 2026-11-30).
MOST_REMAINDERS = 100_000
MULTIPLE_OF = "multipleOf"
MOST_CHOICES = 4096
# Begins a JSON schema inside of a grammar.
JSON = "%json"


def source_of(grammar: Grammar) -> str:
    """Return a grammar as llguidance reads it.

    Raises BadRequest if it is not well-formed, or asks for what none of the library's limits bounds.
    """
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object", "x-guidance": JSON_OPTIONS})
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(_checked_schema(grammar.text))
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, _checked_choices(grammar.text)))}")
        case "lark":
            return LLMatcher.grammar_from_lark(_checked_lark(grammar.text))


def _checked_schema(text: str) -> dict[str, Any]:
    """Return a JSON schema with the options of its texts.  Raises BadRequest."""
    schema = _parsed(text, "the JSON schema")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise BadRequest(f"the JSON schema is {json.dumps(schema)[:40]}: give an object")
    _check_multiples(schema)
    own = schema.get("x-guidance", {})
    if not isinstance(own, dict):
        raise BadRequest("x-guidance of the JSON schema is no object")
    return {**schema, "x-guidance": {**JSON_OPTIONS, **own}}


def _checked_lark(text: str) -> str:
    """Return a grammar in which the JSON schemas are checked, and have the options of their texts.

    Raises BadRequest, also for what other notations could hide.
    """
    if any(name in text for name in ("%regex", "%llguidance")):
        raise BadRequest("%regex and %llguidance are not taken inside of a grammar: write the rules out")
    checked, at = "", 0
    while (found := text.find(JSON, at)) >= 0:
        begin = found + len(JSON)
        begin += len(text[begin:]) - len(text[begin:].lstrip())
        try:
            _, end = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            raise BadRequest(f"{JSON} inside of the grammar is not followed by a JSON schema") from None
        checked += text[at:begin] + json.dumps(_checked_schema(text[begin:end]))
        at = end
    return checked + text[at:]


def _checked_choices(text: str) -> list[str]:
    choices = _parsed(text, "the list of choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise BadRequest("the choices are no list of strings with at least one in it")
    if len(choices) > MOST_CHOICES:
        raise BadRequest(f"{len(choices)} choices are too many: at most {MOST_CHOICES} are taken")
    return choices


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{what} is no JSON: {str(error) or 'it is nested too deeply'}") from None


def _check_multiples(schema: dict[str, Any]) -> None:
    """Raise BadRequest if the multiples of a schema together have too many remainders: `allOf` may combine them."""
    numbers = [Decimal(str(value)).normalize().as_tuple() for value in _multiples(schema) if 0 < value < math.inf]
    if not numbers:
        return
    exponents = [int(number.exponent) for number in numbers]
    whole = math.lcm(*(int("".join(map(str, number.digits))) for number in numbers))
    remainders = whole * 10 ** min(max(exponents) - min(exponents), 30)
    if remainders > MOST_REMAINDERS:
        raise BadRequest(
            f"{MULTIPLE_OF} in the JSON schema needs {remainders:.3g} remainders, at most {MOST_REMAINDERS} are taken: "
            "use smaller or fewer multiples"
        )


def _multiples(part: Any) -> Iterator[float]:
    """Yield every number that a schema or a part of it asks for multiples of."""
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            value = part.get(MULTIPLE_OF)
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield value
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
