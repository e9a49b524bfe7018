"""Read an answer while it streams: its text, what the model thinks, and the tools that it calls."""

from treeswarm_client.tool_calls.bodies.call_reader import CallReader, read_block
from treeswarm_client.tool_calls.events import AnswerEvent, EventCollector
from treeswarm_client.tool_calls.formats import AnswerFormat
from treeswarm_client.tool_calls.harmony import read_harmony
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.reader import Reading, TextReader


class AnswerParser:
    """Turns the pieces of one answer into events.

    A mark of the format never reaches the events, however it is cut into pieces.  Text that was to be a call and is
    none becomes content; once a call has begun, its arguments are what the model wrote, whole or not.
    """

    def __init__(self, form: AnswerFormat, tools: OfferedTools | None, *, is_thinking: bool = False) -> None:
        """`tools` are those that the model may call, or None to read calls as text.

        `is_thinking` says whether the answer begins within thinking, because its prompt ends there.
        """
        self._text = TextReader()
        self._calls = CallReader(self._text, EventCollector(), tools or OfferedTools())
        self._parser = self._read(form, tools is not None, is_thinking)
        self._is_done = False

    @property
    def has_calls(self) -> bool:
        """Whether the answer calls a tool."""
        return self._calls.events.calls > 0 or self._calls.events.in_call

    def feed(self, piece: str) -> list[AnswerEvent]:
        """Return what the next piece of the answer brings."""
        self._text.feed(piece)
        self._advance()
        return self._calls.events.take()

    def finish(self) -> list[AnswerEvent]:
        """Return what is left at the end of the answer."""
        self._text.end()
        self._advance()
        self._calls.events.finish()
        return self._calls.events.take()

    def _advance(self) -> None:
        if not self._is_done:
            self._is_done = next(self._parser, True) is True

    def _read(self, form: AnswerFormat, may_call: bool, is_thinking: bool) -> Reading[None]:
        if form.is_harmony:
            yield from read_harmony(self._calls)
            return
        if form.reasoning is not None:
            yield from form.reasoning.read_first(self._calls, is_open=is_thinking)
        openers = dict(form.calls.openers) if form.calls is not None and may_call else {}
        dropped = form.calls.dropped if form.calls is not None and may_call else ()
        if form.calls is not None and may_call:
            yield from self._read_leading(form)
        thinking = form.reasoning if form.reasoning is not None and form.reasoning.anywhere else None
        marks = (*openers, *dropped, *((thinking.opener,) if thinking is not None else ()))
        while True:
            mark = yield from self._text.until(marks or ("\0",), self._calls.events.content)
            if not mark:
                return
            if mark in openers:
                yield from read_block(self._calls, mark, openers[mark])
            elif thinking is not None and mark == thinking.opener:
                yield from thinking.read(self._calls)

    def _read_leading(self, form: AnswerFormat) -> Reading[None]:
        """Read calls that nothing but their place at the beginning of the answer tells from text."""
        assert form.calls is not None
        if not form.calls.leading:
            return
        self._text.mark()
        yield from self._text.spaces()
        body = form.calls.leading.get((yield from self._text.peek()))
        self._text.rewind()
        if body is not None:
            yield from read_block(self._calls, "", body)
