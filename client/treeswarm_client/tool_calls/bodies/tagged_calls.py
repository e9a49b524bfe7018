"""Calls whose arguments stand in tags, one by one and without quotes: Qwen3-Coder's, GLM's and MiniMax's."""

import json
from dataclasses import dataclass
from typing import Any

from treeswarm_client.tool_calls.bodies.call_reader import LONGEST_HEADER, CallReader, read_closer
from treeswarm_client.tool_calls.lark import LarkWriter, parameters
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.reader import BrokenCall, Reading


@dataclass(frozen=True)
class TaggedCalls:
    """Reads functions with parameters.  The types of the tools' parameters say what a value is."""

    function: str
    """Text before a function's name, or an empty text if the name comes at once."""
    name_end: str
    """Text after the name."""
    key: str
    """Text before a parameter's name."""
    key_end: str
    """Text after it; white space may follow."""
    value: str
    """Text before the value, or an empty text."""
    value_end: str
    function_end: str
    """Text after the last parameter, or an empty text if only the closer comes."""
    closer: str
    own_lines: bool
    """Whether a value stands on lines of its own, whose breaks are not part of it."""
    holds_several: bool = False
    begins_with_function: bool = False
    """Whether the mark that was read already is the text before the name."""

    @property
    def marks(self) -> tuple[str, ...]:
        texts = (self.function, self.key, self.key_end, self.value, self.value_end, self.function_end, self.closer)
        return tuple(text for text in texts if text)

    def read(self, calls: CallReader) -> Reading[None]:
        at_name = self.begins_with_function
        while True:
            yield from calls.text.spaces()
            if not at_name:
                yield from calls.text.expect(self.function)
            at_name = False
            yield from self._read_function(calls)
            if not self.function_end:
                break
            yield from calls.text.spaces()
            if not (yield from calls.text.comes(self.function)):
                break
        yield from read_closer(calls, self.closer)

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        functions = lark.either([self._function(lark, name, tools) for name in tools.schemas])
        line = lark.text("\n") if self.own_lines else '"\\n"?' if self.function else ""
        if self.holds_several:
            functions = lark.repeated(functions, lark.text("\n"), several=several)
        return f"{line} {functions} {lark.text(self.closer)}"

    def _function(self, lark: LarkWriter, name: str, tools: OfferedTools) -> str:
        written = [lark.text(f"{self.function}{name}{self.name_end}"), '"\\n"?']
        for key, schema, is_required in parameters(tools.schemas[name]):
            one = f'{lark.text(self.key + key + self.key_end)} {self._value(lark, name, key, schema, tools)} "\\n"?'
            written.append(one if is_required else f"({one})?")
        end = f'{lark.text(self.function_end)} "\\n"?' if self.function_end else ""
        return lark.rule(" ".join([*written, end]))

    def _value(self, lark: LarkWriter, tool: str, key: str, schema: Any, tools: OfferedTools) -> str:
        begin = f'"\\n"? {lark.text(self.value)}' if self.value else '"\\n"' if self.own_lines else ""
        end = ("\n" if self.own_lines else "") + self.value_end
        choices = schema.get("enum") if isinstance(schema, dict) else None
        if choices and all(isinstance(choice, str) for choice in choices):
            return f"{begin} {lark.either([lark.text(choice) for choice in choices])} {lark.text(end)}"
        if tools.is_text(tool, key):
            return f"{begin} {lark.up_to(end)}"
        return f"{begin} {lark.json(schema)} {lark.text(end)}"

    def _read_function(self, calls: CallReader) -> Reading[None]:
        name, known_end = yield from self._read_name(calls)
        calls.begin(name)
        calls.events.arguments("{")
        first = True
        while not known_end:
            yield from calls.text.spaces()
            if (yield from calls.text.literal(self.function_end or self.closer)):
                break
            if not (yield from calls.text.literal(self.key)):
                raise BrokenCall
            key, _ = yield from calls.text.text_until((self.key_end,), LONGEST_HEADER)
            calls.events.arguments(("" if first else ", ") + json.dumps(key.strip(), ensure_ascii=False) + ": ")
            yield from self._read_value(calls, name, key.strip())
            first = False
        calls.events.arguments("}")
        calls.end()

    def _read_name(self, calls: CallReader) -> Reading[tuple[str, bool]]:
        """Read the name, and return whether the call ends right after it."""
        if self.function:
            name, _ = yield from calls.text.text_until((self.name_end,), LONGEST_HEADER)
            return name.strip(), False
        name = ""
        while len(name) <= LONGEST_HEADER:
            if name.strip() and (yield from calls.text.literal(self.closer)):
                return name.strip(), True
            if (character := (yield from calls.text.peek())) in ("<", "") or (name.strip() and character == "\n"):
                break
            calls.text.now()
            name += character
        yield from calls.text.spaces()
        # What follows must be a parameter or the end: any other text in these marks is no call.
        if (yield from calls.text.literal(self.closer)):
            return name.strip(), True
        if not (yield from calls.text.comes(self.key)):
            raise BrokenCall
        return name.strip(), False

    def _read_value(self, calls: CallReader, tool: str, key: str) -> Reading[None]:
        if self.value:
            yield from calls.text.spaces()
            yield from calls.text.expect(self.value)
        if self.own_lines:
            yield from calls.text.literal("\n")
        ends = ("\n" + self.value_end, self.value_end) if self.own_lines else (self.value_end,)
        if calls.tools.is_text(tool, key):
            calls.events.arguments('"')
            if not (yield from calls.text.until(ends, lambda text: calls.events.arguments(_escaped(text)))):
                raise BrokenCall
            calls.events.arguments('"')
            return
        written: list[str] = []
        if not (yield from calls.text.until(ends, written.append)):
            raise BrokenCall
        value = calls.tools.value(tool, key, "".join(written))
        calls.events.arguments(json.dumps(value, ensure_ascii=False))


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
