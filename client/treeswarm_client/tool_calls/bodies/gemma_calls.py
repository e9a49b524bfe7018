"""Calls as Gemma writes them: `call:name{key:value}`, where a mark of its own quotes texts."""

import json
from dataclasses import dataclass

from treeswarm_client.tool_calls.bodies.call_reader import LONGEST_HEADER, CallReader, read_closer
from treeswarm_client.tool_calls.lark import Item, LarkWriter, parameters
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.reader import BrokenCall, Reading, read_json_string

# Largest number of characters of a number or a word.
LONGEST_WORD = 64
# Name of the grammar's rule that refers to itself.
NESTED = "nested"


@dataclass(frozen=True)
class GemmaCall:
    """Reads one call."""

    quote: str
    closer: str
    holds_several: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.quote, self.closer)

    def read(self, calls: CallReader) -> Reading[None]:
        yield from calls.text.spaces()
        yield from calls.text.expect("call:")
        name, _ = yield from calls.text.text_until(("{",), LONGEST_HEADER)
        calls.begin(name.strip())
        yield from self._read_object(calls)
        calls.end()
        yield from read_closer(calls, self.closer)

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        value = self._any_value(lark)
        made = [self._one(lark, name, value, tools) for name in tools.schemas]
        return f"{lark.either(made)} {lark.text(self.closer)}"

    def _one(self, lark: LarkWriter, name: str, value: str, tools: OfferedTools) -> str:
        items = [
            Item(f"{lark.text(f'{key}:')} {self._value(lark, name, key, value, tools)}", is_required)
            for key, _, is_required in parameters(tools.schemas[name])
        ]
        return f"{lark.text(f'call:{name}{{')} {lark.sequence(items, lark.text(','))} {lark.text('}')}"

    def _value(self, lark: LarkWriter, tool: str, key: str, value: str, tools: OfferedTools) -> str:
        """Return the expression of one argument.  Of its schema only the type counts: the form is not JSON."""
        forms = {"string": self._quoted(lark), "integer": "/-?(0|[1-9][0-9]*)/", "boolean": "/true|false/"}
        kinds = tools.types(tool, key)
        return forms.get(kinds[0], value) if len(kinds) == 1 else value

    def _quoted(self, lark: LarkWriter) -> str:
        return f"{lark.text(self.quote)} {lark.up_to(self.quote)}"

    def _any_value(self, lark: LarkWriter) -> str:
        """Return the expression of a value of any type, which may nest."""
        quoted, scalar = self._quoted(lark), r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null/"
        pair = f'({quoted} | /[A-Za-z_][A-Za-z0-9_]*/) ":" {NESTED}'
        lark.add(
            NESTED, f'{quoted} | {scalar} | "[" ({NESTED} ("," {NESTED})*)? "]" | "{{" ({pair} ("," {pair})*)? "}}"'
        )
        return NESTED

    def _read_object(self, calls: CallReader) -> Reading[None]:
        """Read an object after its brace."""
        calls.events.arguments("{")
        first = True
        while True:
            yield from calls.text.spaces()
            if (yield from calls.text.literal("}")):
                break
            if not first:
                yield from calls.text.expect(",")
                calls.events.arguments(", ")
                yield from calls.text.spaces()
            yield from self._read_key(calls)
            calls.events.arguments(": ")
            yield from self._read_value(calls)
            first = False
        calls.events.arguments("}")

    def _read_key(self, calls: CallReader) -> Reading[None]:
        if (yield from calls.text.literal(self.quote)):
            yield from self._read_quoted(calls)
            yield from calls.text.spaces()
            yield from calls.text.expect(":")
        elif (yield from calls.text.peek()) == '"':
            calls.events.arguments((yield from read_json_string(calls.text)))
            yield from calls.text.spaces()
            yield from calls.text.expect(":")
        else:
            key, _ = yield from calls.text.text_until((":",), LONGEST_HEADER)
            calls.events.arguments(json.dumps(key.strip(), ensure_ascii=False))

    def _read_value(self, calls: CallReader) -> Reading[None]:
        yield from calls.text.spaces()
        if (yield from calls.text.literal(self.quote)):
            yield from self._read_quoted(calls)
        elif (yield from calls.text.literal("{")):
            yield from self._read_object(calls)
        elif (yield from calls.text.literal("[")):
            yield from self._read_list(calls)
        elif (yield from calls.text.peek()) == '"':
            calls.events.arguments((yield from read_json_string(calls.text)))
        else:
            yield from self._read_word(calls)

    def _read_list(self, calls: CallReader) -> Reading[None]:
        calls.events.arguments("[")
        first = True
        while True:
            yield from calls.text.spaces()
            if (yield from calls.text.literal("]")):
                break
            if not first:
                yield from calls.text.expect(",")
                calls.events.arguments(", ")
            yield from self._read_value(calls)
            first = False
        calls.events.arguments("]")

    def _read_quoted(self, calls: CallReader) -> Reading[None]:
        def add(text: str) -> None:
            calls.events.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

        calls.events.arguments('"')
        if not (yield from calls.text.until((self.quote,), add)):
            raise BrokenCall
        calls.events.arguments('"')

    def _read_word(self, calls: CallReader) -> Reading[None]:
        """Read a number, true, false or null; another word is a text without quotes."""
        word = ""
        while (character := (yield from calls.text.peek())) not in (",", "}", "]", "") and len(word) < LONGEST_WORD:
            calls.text.now()
            word += character
        word = word.strip()
        if not word:
            raise BrokenCall
        try:
            json.loads(word)
        except ValueError:
            word = json.dumps(word, ensure_ascii=False)
        calls.events.arguments(word)
