"""Calls whose name stands before their arguments, which are a JSON object: DeepSeek's, Kimi's and Mistral's."""

from dataclasses import dataclass

from treeswarm_client.tool_calls.bodies.call_reader import LONGEST_HEADER, CallReader, read_closer
from treeswarm_client.tool_calls.bodies.json_calls import LIST, JsonCalls
from treeswarm_client.tool_calls.lark import LarkWriter
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.reader import BrokenCall, Reading

FENCE = "```"


@dataclass(frozen=True)
class DeepSeekCall:
    """Reads `function<sep>name`, a line with a fence and `json`, the arguments and the fence; or `name<sep>{…}`."""

    separator: str
    closer: str
    holds_several: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.separator, self.closer)

    def read(self, calls: CallReader) -> Reading[None]:
        header, _ = yield from calls.text.text_until((self.separator,), LONGEST_HEADER)
        yield from calls.text.spaces()
        if (yield from calls.text.peek()) == "{":
            yield from calls.object_arguments(header.strip())
        else:
            name, _ = yield from calls.text.text_until(("\n",), LONGEST_HEADER)
            yield from calls.text.expect(FENCE + "json")
            yield from calls.object_arguments(name.strip())
            yield from calls.text.spaces()
            yield from calls.text.literal(FENCE)
        calls.end()
        yield from read_closer(calls, self.closer)

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        forms = []
        for name, schema in tools.schemas.items():
            arguments = lark.arguments(schema)
            forms.append(f"{lark.text(name + self.separator)} {arguments} {lark.text(self.closer)}")
            fenced, end = f"function{self.separator}{name}\n{FENCE}json\n", f"\n{FENCE}{self.closer}"
            forms.append(f"{lark.text(fenced)} {arguments} {lark.text(end)}")
        return lark.either(forms)


@dataclass(frozen=True)
class KimiCall:
    """Reads `functions.name:0<begin>{…}<end>`, where the text before `<begin>` is the call's id."""

    begin: str
    closer: str
    holds_several: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.begin, self.closer)

    def read(self, calls: CallReader) -> Reading[None]:
        header, _ = yield from calls.text.text_until((self.begin,), LONGEST_HEADER)
        id = header.strip()
        name, _, number = id.removeprefix("functions.").rpartition(":")
        if not number.isdecimal():
            raise BrokenCall
        yield from calls.object_arguments(name, id)
        calls.end()
        yield from read_closer(calls, self.closer)

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        forms = [
            f"{lark.text(f'functions.{name}:')} /[0-9]+/ {lark.text(self.begin)} {lark.arguments(schema)}"
            for name, schema in tools.schemas.items()
        ]
        return f"{lark.either(forms)} {lark.text(self.closer)}"


@dataclass(frozen=True)
class MistralCalls:
    """Reads `[{"name": "f", "arguments": {…}}]`, or `f[ARGS]{…}`, also with `[CALL_ID]` and an id before `[ARGS]`."""

    arguments: str = "[ARGS]"
    id: str = "[CALL_ID]"
    closer: str = ""
    holds_several: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.id, self.arguments)

    def read(self, calls: CallReader) -> Reading[None]:
        yield from calls.text.spaces()
        if (yield from calls.text.peek()) in ("[", "{"):
            yield from JsonCalls().read(calls)
            return
        id = None
        name, mark = yield from self._header(calls)
        if mark == self.id:
            id, _ = yield from calls.text.text_until((self.arguments,), LONGEST_HEADER)
        yield from calls.object_arguments(name.strip(), id)
        calls.end()

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        # Tokenizers from version 11 on have a token for arguments; before, calls were a list.
        if self.arguments not in lark.special:
            return JsonCalls(brackets=LIST).grammar(lark, tools, several=several)
        forms = [
            f"{lark.text(name + self.arguments)} {lark.arguments(schema)}" for name, schema in tools.schemas.items()
        ]
        return lark.either(forms)

    def _header(self, calls: CallReader) -> Reading[tuple[str, str]]:
        """Read the name and what comes after it; the brace of arguments that follow at once is not read."""
        name = ""
        while len(name) <= LONGEST_HEADER:
            for mark in (self.arguments, self.id):
                if (yield from calls.text.literal(mark)):
                    return name, mark
            if (yield from calls.text.peek()) == "{":
                return name, ""
            while (character := calls.text.now()) is None:
                yield
            if not character:
                break
            name += character
        raise BrokenCall
