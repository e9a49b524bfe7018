"""A conversation, and what a user typed into it.  Pure."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from treeswarm_client.chat_template import MessageDict

QUOTES = '"""'
COMMANDS: Mapping[str, str] = {
    "/help": "this list",
    "/new": "begin again; the system text stays",
    "/system": "/system TEXT: what the model is told before all; alone: nothing any more",
    "/undo": "take back the last message and its answer",
    "/retry": "another answer to the last message (with --temperature above 0, another text)",
    "/save": "/save FILE: the conversation, as JSON where the name ends in .json",
    "/stats": "what the last answer cost, and all together",
    "/quit": "leave, as Ctrl-D does",
}


@dataclass(frozen=True)
class Turn:
    """A message and its answer, perhaps as far as it came."""

    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """What both have said."""

    system: str = ""
    turns: tuple[Turn, ...] = ()

    def messages(self, question: str | None = None) -> list[MessageDict]:
        """For a chat template, with a `question` to be answered last."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            told.append({"role": "user", "content": turn.question})
            told.append({"role": "assistant", "content": turn.answer})
        return [*told, {"role": "user", "content": question}] if question is not None else list(told)

    def answered(self, question: str, answer: str) -> "Conversation":
        """With one turn more."""
        return replace(self, turns=(*self.turns, Turn(question, answer)))

    def undone(self) -> "Conversation":
        """Without the last turn."""
        return replace(self, turns=self.turns[:-1])

    def as_text(self) -> str:
        """To be read."""
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages()) + "\n"


@dataclass(frozen=True)
class Entry:
    """What was typed, whole: a message or a command."""

    text: str
    command: str = ""
    """With its slash; `text` is what followed it."""


@dataclass(frozen=True)
class PartialEntry:
    """Lines typed so far of what may become one entry."""

    lines: tuple[str, ...] = ()
    quoted: bool = False
    """Between triple quotes, where lines are taken as they are."""

    @property
    def begun(self) -> bool:
        return bool(self.lines) or self.quoted

    def add(self, line: str) -> "PartialEntry | Entry":
        """With one line more: an entry if that ended it."""
        if self.quoted:
            return self._add_quoted(line)
        if not self.lines and line.lstrip().startswith(QUOTES):
            return PartialEntry(quoted=True)._add_quoted(line.lstrip().removeprefix(QUOTES))
        if line.endswith("\\"):
            return replace(self, lines=(*self.lines, line[:-1]))
        whole = "\n".join((*self.lines, line))
        return Entry(whole) if self.lines else _entry(whole)

    def ended(self) -> Entry | None:
        """What it comes to where no line follows."""
        return Entry("\n".join(self.lines)) if self.lines else None

    def _add_quoted(self, line: str) -> "PartialEntry | Entry":
        if line.rstrip().endswith(QUOTES):
            last = line.rstrip().removesuffix(QUOTES)
            return Entry("\n".join((*self.lines, last) if last else self.lines))
        # A first line of nothing is the line end behind the quotes.
        return replace(self, lines=(*self.lines, line) if line or self.lines else ())


def _entry(line: str) -> Entry:
    """A single line: `//` begins a message that begins with a slash."""
    if line.startswith("//"):
        return Entry(line[1:])
    if line.startswith("/"):
        command, _, rest = line.strip().partition(" ")
        return Entry(rest.strip(), command)
    return Entry(line)


def unknown_command(word: str) -> str:
    """What to say of a command that is none."""
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "/help lists all"
    return f"there is no {word}: {hint} (a message that begins with a slash is written //…)"
