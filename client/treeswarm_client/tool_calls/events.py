"""The events of an answer as it streams, and what collects them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ContentText:
    """The next piece of the answer's own text."""

    text: str


@dataclass(frozen=True)
class ReasoningText:
    """The next piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The model calls a tool."""

    index: int
    """Number of the call in its answer, from 0."""
    name: str
    id: str | None = None
    """Id that the model gave the call, or None if its format has none."""


@dataclass(frozen=True)
class ArgumentsText:
    """The next piece of a call's arguments, which are JSON."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """A call is complete, or the answer ended in it."""

    index: int


AnswerEvent = ContentText | ReasoningText | CallBegun | ArgumentsText | CallEnded


@dataclass(eq=False)
class EventCollector:
    """Collects events, and leaves out white space around reasoning and calls, which belongs to their format."""

    _events: list[AnswerEvent] = field(default_factory=list)
    _spaces: str = ""
    """White space that is part of the text if more text follows."""
    _trims_start: bool = False
    """Whether white space is left out until other text comes."""
    _has_content: bool = False
    _after_section: bool = False
    """Whether reasoning or a call came after the last content."""
    calls: int = 0
    """Number of calls so far."""
    in_call: bool = False

    def take(self) -> list[AnswerEvent]:
        """Return the events since the last time, neighbours of one kind joined."""
        events, self._events = self._events, []
        return events

    def content(self, text: str) -> None:
        if shown := self._held_back(text):
            if self._has_content and self._after_section:
                shown = "\n" + shown  # in place of the white space on both sides of it
            self._has_content, self._after_section = True, False
            self._add_text(ContentText(shown))

    def reasoning(self, text: str) -> None:
        if shown := self._held_back(text):
            self._add_text(ReasoningText(shown))

    def start_section(self) -> None:
        """Note that reasoning begins or ends here: white space on both sides of it is dropped."""
        self._spaces, self._trims_start, self._after_section = "", True, True

    def begin_call(self, name: str, id: str | None = None) -> None:
        self.start_section()
        self._events.append(CallBegun(self.calls, name, id))
        self.in_call = True

    def arguments(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, ArgumentsText):
            self._events[-1] = ArgumentsText(self.calls, last.text + text)
        elif text:
            self._events.append(ArgumentsText(self.calls, text))

    def end_call(self) -> None:
        self._events.append(CallEnded(self.calls))
        self.calls += 1
        self.in_call = False

    def finish(self) -> None:
        """End the answer: white space at its end is part of the text."""
        if self.in_call:
            self.end_call()
        if self._spaces and not self._trims_start:
            self._add_text(ContentText(self._spaces))
        self._spaces = ""

    def _held_back(self, text: str) -> str:
        if self._trims_start:
            text = text.lstrip()
            self._trims_start = not text
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        return shown

    def _add_text(self, event: ContentText | ReasoningText) -> None:
        last = self._events[-1] if self._events else None
        if type(last) is type(event):
            self._events[-1] = type(event)(last.text + event.text)
        else:
            self._events.append(event)
