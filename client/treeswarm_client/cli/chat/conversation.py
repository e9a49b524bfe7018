"""A conversation, and the messages and commands that a user types.  Pure."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from treeswarm_client.chat_template import MessageDict

QUOTES = '"""'
COMMANDS: Mapping[str, str] = {
    "/help": "list the commands",
    "/new": "begin a new conversation; the system text stays",
    "/system": "/system TEXT: set the system text; without TEXT, remove it",
    "/undo": "take back the last message and its answer",
    "/retry": "answer the last message again (the text differs with --temperature above 0)",
    "/save": "/save FILE: write the conversation, as JSON if the name ends in .json",
    "/stats": "show what the last answer cost, and all together",
    "/quit": "leave, as with Ctrl-D",
}


@dataclass(frozen=True)
class Turn:
    """A message and its answer, which may be partial."""

    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """The messages so far, of both sides."""

    system: str = ""
    turns: tuple[Turn, ...] = ()

    def messages(self, question: str | None = None) -> list[MessageDict]:
        """Return the messages for a chat template, with `question` as the last one, if given."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": question}] if question is not None else list(messages)

    def with_turn(self, question: str, answer: str) -> "Conversation":
        """Return the conversation with one more turn."""
        return replace(self, turns=(*self.turns, Turn(question, answer)))

    def without_last_turn(self) -> "Conversation":
        """Return the conversation without its last turn."""
        return replace(self, turns=self.turns[:-1])

    def as_text(self) -> str:
        """Return the conversation as text for readers."""
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages()) + "\n"


@dataclass(frozen=True)
class Entry:
    """A complete message or command."""

    text: str
    command: str = ""
    """Name of the command with its slash, or empty for a message; then `text` is its argument."""


@dataclass(frozen=True)
class PartialEntry:
    """The lines typed so far of an entry that is not complete."""

    lines: tuple[str, ...] = ()
    quoted: bool = False
    """Whether the lines are between triple quotes, where they are taken as they are."""

    @property
    def begun(self) -> bool:
        """Whether there is anything to continue."""
        return bool(self.lines) or self.quoted

    def add(self, line: str) -> "PartialEntry | Entry":
        """Add a line, and return the entry if it is complete now."""
        if self.quoted:
            return self._add_quoted(line)
        if not self.lines and line.lstrip().startswith(QUOTES):
            return PartialEntry(quoted=True)._add_quoted(line.lstrip().removeprefix(QUOTES))
        if line.endswith("\\"):
            return replace(self, lines=(*self.lines, line[:-1]))
        whole = "\n".join((*self.lines, line))
        return Entry(whole) if self.lines else _entry(whole)

    def finish(self) -> Entry | None:
        """Return the entry if no more lines follow, or None if there is nothing."""
        return Entry("\n".join(self.lines)) if self.lines else None

    def _add_quoted(self, line: str) -> "PartialEntry | Entry":
        if line.rstrip().endswith(QUOTES):
            last = line.rstrip().removesuffix(QUOTES)
            return Entry("\n".join((*self.lines, last) if last else self.lines))
        # An empty first line is only the line end after the quotes.
        return replace(self, lines=(*self.lines, line) if line or self.lines else ())


def _entry(line: str) -> Entry:
    """Parse a single line; `//` begins a message that starts with a slash."""
    if line.startswith("//"):
        return Entry(line[1:])
    if line.startswith("/"):
        command, _, rest = line.strip().partition(" ")
        return Entry(rest.strip(), command)
    return Entry(line)


def unknown_command(word: str) -> str:
    """Return the error message for an unknown command."""
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "/help lists all commands"
    return f"there is no command {word}: {hint} (to send a message that starts with a slash, type two slashes)"
