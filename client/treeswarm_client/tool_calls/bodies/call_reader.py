"""What the parsers of all formats read from and write to."""

from dataclasses import dataclass
from typing import Protocol

from treeswarm_client.tool_calls.events import EventCollector
from treeswarm_client.tool_calls.lark import LarkWriter
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.reader import BrokenCall, Reading, TextReader, read_json_value

# Largest number of characters of a function's name and of what stands beside it; OpenAI allows names of 64.
LONGEST_HEADER = 256
# A character that no tokenizer writes.
NEVER = "\0"
# Characters that models write too many of at the end of a call.
SUPERFLUOUS = "}])"


@dataclass(eq=False)
class CallReader:
    """A text that is being read, the events that it brings, and the tools that it may call."""

    text: TextReader
    events: EventCollector
    tools: OfferedTools

    def begin(self, name: str, id: str | None = None) -> None:
        """Begin a call: its text does not become content any more.  Raises BrokenCall for what is no name."""
        if not name or any(character.isspace() for character in name):
            raise BrokenCall
        self.text.release()
        self.events.begin_call(name, id)

    def end(self) -> None:
        """End a call, and mark the place: if another call of the same block is broken, its text is content."""
        self.events.end_call()
        self.text.mark()

    def object_arguments(self, name: str, id: str | None = None) -> Reading[None]:
        """Begin a call and read its arguments, a JSON object.  Raises BrokenCall."""
        yield from self.text.spaces()
        if (yield from self.text.peek()) != "{":
            raise BrokenCall
        self.begin(name, id)
        yield from read_json_value(self.text, self.events.arguments)


class CallBody(Protocol):
    """A parser of what follows the mark that begins one call, or a block of calls."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts of the format that it reads, some of which are special tokens."""
        ...

    @property
    def closer(self) -> str:
        """Text that ends what it reads, or an empty text."""
        ...

    def read(self, calls: CallReader) -> Reading[None]:
        """Read the calls.  Raises BrokenCall if the text is none."""
        ...

    def grammar(self, lark: LarkWriter, tools: OfferedTools, *, several: bool) -> str:
        """Return the expression of what it reads: a call of one of the tools, or several calls if a list holds them."""
        ...

    @property
    def holds_several(self) -> bool:
        """Whether one body holds several calls, so that it comes only once."""
        ...


def read_block(calls: CallReader, opener: str, body: CallBody) -> Reading[None]:
    """Read one block of calls after its opener.  If it is broken, what was no call becomes content."""
    before = calls.events.calls
    calls.text.mark()
    try:
        yield from body.read(calls)
    except BrokenCall:
        if calls.events.in_call:  # the arguments stay as the model wrote them
            yield from calls.text.until((body.closer or NEVER,), calls.events.arguments)
            calls.events.end_call()
        else:
            calls.text.rewind()
            if calls.events.calls == before:
                calls.events.content(opener)
    calls.text.release()


def read_closer(calls: CallReader, closer: str) -> Reading[None]:
    """Read the mark that ends a call, with white space and superfluous brackets before it, if it comes.

    Where the answer's length cut the mark, its beginning is read: it is no content either.
    """
    if not closer:
        return
    calls.text.mark()
    while (character := (yield from calls.text.peek())) and (character.isspace() or character in SUPERFLUOUS):
        calls.text.now()
    if (yield from calls.text.literal(closer)) or calls.text.ends_within(closer):
        calls.text.mark()
    calls.text.rewind()
    calls.text.mark()
