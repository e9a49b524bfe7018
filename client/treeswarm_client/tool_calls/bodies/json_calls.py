"""Calls that are JSON objects with the function's name and arguments, alone, in a list, or one after the other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from treeswarm_client.tool_calls.bodies.call_reader import CallReader, read_closer
from treeswarm_client.tool_calls.lark import LarkWriter
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.reader import BrokenCall, Reading, read_json_string, read_json_value

NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters", "args")
IDS = ("id", "tool_call_id")
# How most models write a list of calls.
LIST = ("[", ", ", "]")
# Stand in a form for what the grammar has there.
HERE, NUMBER = "\0", "\1"


@dataclass(frozen=True)
class JsonCalls:
    """Reads objects as `{"name": "f", "arguments": {}}`."""

    closer: str = ""
    """Text that ends them, or an empty text if nothing does."""
    separators: str = ",;"
    """Characters between objects that are in no list."""
    needs_known_names: bool = False
    """Whether only objects that name an offered tool are calls: nothing but their shape tells them from an answer."""
    form: str = '{{"name": {name}, "arguments": {arguments}}}'
    """How a model that must call writes an object; `{number}` is the number of the call."""
    brackets: tuple[str, str, str] | None = None
    """What a model that must call writes before, between and after its calls if they are a list."""
    line: str = ""
    """What it writes on both sides of them."""

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.closer,) if self.closer else ()

    @property
    def holds_several(self) -> bool:
        return self.brackets is not None

    def read(self, calls: CallReader) -> Reading[None]:
        yield from calls.text.spaces()
        is_list = yield from calls.text.literal("[")
        while True:
            yield from calls.text.spaces()
            yield from _ObjectReader(calls, self.needs_known_names).read()
            yield from calls.text.spaces()
            if is_list:
                if (yield from calls.text.literal("]")):
                    break
                yield from calls.text.expect(",")
            elif not (yield from self._separator(calls)):
                break
        calls.text.mark()
        yield from read_closer(calls, self.closer)

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        calls = lark.either([self._one(lark, name, schema) for name, schema in tools.schemas.items()])
        if self.brackets is not None:
            begin, between, end = map(lark.text, self.brackets)
            calls = f"{begin} {lark.repeated(calls, between, several=several)} {end}"
        return f"{lark.text(self.line)} {calls} {lark.text(self.line + self.closer)}"

    def _one(self, lark: LarkWriter, name: str, schema: Mapping[str, Any]) -> str:
        written = self.form.format(name=json.dumps(name), arguments=HERE, number=NUMBER)
        parts = [part.split(NUMBER) for part in written.split(HERE)]
        texts = [" /[0-9]+/ ".join(map(lark.text, part)) for part in parts]
        return f" {lark.arguments(schema)} ".join(texts)

    def _separator(self, calls: CallReader) -> Reading[bool]:
        character = yield from calls.text.peek()
        if character and character in self.separators:
            calls.text.now()
            return True
        return character == "{"


@dataclass(eq=False)
class _ObjectReader:
    """Reads one object."""

    calls: CallReader
    needs_known_names: bool
    name: str = ""
    held: list[str] = field(default_factory=list)
    """Arguments that came before the name."""
    id: str | None = None

    def read(self) -> Reading[None]:
        text = self.calls.text
        yield from text.expect("{")
        while True:
            yield from text.spaces()
            key = _decoded((yield from read_json_string(text)))
            yield from text.spaces()
            yield from text.expect(":")
            yield from text.spaces()
            yield from self._read_field(key)
            yield from text.spaces()
            if (yield from text.literal("}")):
                break
            yield from text.expect(",")
        if not self.calls.events.in_call:
            self._begin()
            self.calls.events.arguments("".join(self.held) or "{}")
        self.calls.end()

    def _read_field(self, key: str) -> Reading[None]:
        text = self.calls.text
        if key in NAMES and not self.name:
            self.name = _decoded((yield from read_json_string(text)))
            if self.needs_known_names and self.name not in self.calls.tools.schemas:
                raise BrokenCall
        elif key in ARGUMENTS and not self.held and not self.calls.events.in_call:
            yield from self._read_arguments()
        elif key in IDS and (yield from text.peek()) == '"':
            self.id = _decoded((yield from read_json_string(text)))
        else:
            yield from read_json_value(text, lambda _: None)

    def _read_arguments(self) -> Reading[None]:
        """Read the arguments: an object, that object as text, or null."""
        first = yield from self.calls.text.peek()
        if first == "{" and self.name:
            self._begin()
            yield from read_json_value(self.calls.text, self.calls.events.arguments)
            return
        yield from read_json_value(self.calls.text, self.held.append)
        if first != "{":
            self.held = [_object_in(_loaded("".join(self.held)))]

    def _begin(self) -> None:
        self.calls.begin(self.name, self.id)


def _object_in(value: object) -> str:
    """Return the object that stands for a value: the object that a text holds, or an empty one for null."""
    if isinstance(value, str):
        text = value.strip() or "{}"
        if isinstance(_loaded(text), dict):
            return text
    if value is not None:
        raise BrokenCall
    return "{}"


def _loaded(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        raise BrokenCall from None


def _decoded(written: str) -> str:
    return str(_loaded(written))
