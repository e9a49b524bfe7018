"""Calls that are Python expressions: those of Llama 3 and 4 and of LFM2."""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from treeswarm_client.tool_calls.bodies.call_reader import CallReader, read_closer
from treeswarm_client.tool_calls.bodies.json_calls import JsonCalls
from treeswarm_client.tool_calls.lark import Item, LarkWriter, parameters
from treeswarm_client.tool_calls.offered import WORDS, OfferedTools
from treeswarm_client.tool_calls.reader import BrokenCall, Reading

BRACKETS = {"(": ")", "[": "]", "{": "}"}
# Largest number of characters of an expression: it is read as a whole, and Python's parser nests.
LONGEST_EXPRESSION = 100_000
# Name of the method by which Llama 3's built-in tools are called.
BUILT_IN = "call"
# How Llama 3 writes a call in JSON.
PARAMETERS = '{{"name": {name}, "parameters": {arguments}}}'


@dataclass(frozen=True)
class PythonCalls:
    """Reads `[f(a=1), g()]`, or one call alone."""

    closer: str = ""
    holds_several: bool = True
    needs_known_names: bool = False
    """Whether only expressions that name offered tools are calls."""

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.closer,) if self.closer else ()

    def read(self, calls: CallReader) -> Reading[None]:
        yield from calls.text.spaces()
        expression = yield from _read_expression(calls, begins_with_name=self.needs_known_names)
        made = list(_calls_in(expression))
        if not made or (self.needs_known_names and any(name not in calls.tools.schemas for name, _ in made)):
            raise BrokenCall
        for name, arguments in made:
            calls.begin(name)
            calls.events.arguments(json.dumps(arguments, ensure_ascii=False))
            calls.end()
        yield from read_closer(calls, self.closer)

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        made = lark.either([self._one(lark, name, schema) for name, schema in tools.schemas.items()])
        made = lark.repeated(made, lark.text(", "), several=several)
        return f"{lark.text('[')} {made} {lark.text(']' + self.closer)}"

    def _one(self, lark: LarkWriter, name: str, schema: Mapping[str, Any]) -> str:
        items = [
            Item(f"{lark.text(f'{key}=')} {lark.json(value)}", is_required)
            for key, value, is_required in parameters(schema)
        ]
        return f"{lark.text(f'{name}(')} {lark.sequence(items, lark.text(', '))} {lark.text(')')}"


@dataclass(frozen=True)
class PythonTag:
    """Reads what follows Llama 3's `<|python_tag|>`: JSON objects, or a built-in tool as `name.call(query="…")`."""

    closer: str = ""
    holds_several: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return ()

    def read(self, calls: CallReader) -> Reading[None]:
        yield from calls.text.spaces()
        is_json = (yield from calls.text.peek()) == "{"
        yield from (JsonCalls() if is_json else PythonCalls()).read(calls)

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        return JsonCalls(form=PARAMETERS).grammar(lark, tools, several=several)


def _read_expression(calls: CallReader, *, begins_with_name: bool) -> Reading[str]:
    """Read up to the bracket that closes the first one.  Raises BrokenCall.

    With `begins_with_name` it does so as soon as the first thing in a list is no call: an answer may be a list.
    """
    text, closers, quote, escaped = "", list[str](), "", False
    while len(text) < LONGEST_EXPRESSION:
        while (character := calls.text.now()) is None:
            yield
        # Models break lines within quotes, which Python does not allow.
        text += "\\n" if quote and character == "\n" else character
        if not character or (not closers and character not in BRACKETS and not _names(text)):
            raise BrokenCall
        if begins_with_name and closers == ["]"] and "(" not in text and not _names(text[1:].strip() or "_"):
            raise BrokenCall
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in BRACKETS:
            closers.append(BRACKETS[character])
        elif character in BRACKETS.values():
            if character != closers.pop():
                raise BrokenCall
            if not closers:
                return text
    raise BrokenCall


def _names(text: str) -> bool:
    return text.replace(".", "_").replace("-", "_").isidentifier()


def _calls_in(expression: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BrokenCall from None
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
            raise BrokenCall
        yield _name_of(node.func), {str(keyword.arg): _value_of(keyword.value) for keyword in node.keywords}


def _name_of(function: ast.expr) -> str:
    name = ast.unparse(function)
    if not isinstance(function, ast.Name | ast.Attribute) or not _names(name):
        raise BrokenCall
    return name.removesuffix(f".{BUILT_IN}")


def _value_of(node: ast.expr) -> Any:
    """Return a literal's value; JSON's words for true, false and null count as Python's."""
    match node:
        case ast.Name(id) if id in WORDS:
            return WORDS[id]
        case ast.Constant(str() | int() | float() | bool() | None as value):
            return value
        case ast.List(elts) | ast.Tuple(elts):
            return [_value_of(item) for item in elts]
        case ast.Dict(keys, values):
            return {str(_value_of(key)): _value_of(value) for key, value in zip(keys, values, strict=True) if key}
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
    raise BrokenCall
