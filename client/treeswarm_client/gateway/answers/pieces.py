"""An answer in pieces: its text, the model's thoughts and its calls of tools, as they come.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from treeswarm_client.generation.loop import FinishReason
from treeswarm_client.generation.run import Token
from treeswarm_client.generation.token_logprobs import TokenLogprobs


@dataclass(frozen=True)
class TextPiece:
    """Text that follows the text so far."""

    text: str


@dataclass(frozen=True)
class ThoughtPiece:
    """Text that follows the model's thoughts so far."""

    text: str


@dataclass(frozen=True)
class CallPiece:
    """A call of a tool begins, or its arguments go on."""

    index: int
    """Number of the call in this answer, from 0."""
    call_id: str
    name: str
    arguments: str
    """JSON text that follows the arguments so far."""
    begins: bool
    """Whether this is the call's first piece."""


Piece = TextPiece | ThoughtPiece | CallPiece


class AnswerSplitter(Protocol):
    """Divides one answer's text into pieces."""

    def add(self, text: str) -> list[Piece]:
        """Return the pieces that are certain now that `text` has come."""
        ...

    def end(self) -> list[Piece]:
        """Return the pieces that were held back, at the end of the answer."""
        ...


class PlainSplitter:
    """An answer that is text only."""

    def add(self, text: str) -> list[Piece]:
        return [TextPiece(text)] if text else []

    def end(self) -> list[Piece]:
        return []


@dataclass
class AnsweredCall:
    """One call of a tool."""

    call_id: str
    name: str
    arguments: str = ""
    """JSON text."""


@dataclass
class ChoiceAnswer:
    """What has come of one choice."""

    text: str = ""
    thoughts: str = ""
    calls: list[AnsweredCall] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    thought_tokens: int = 0
    """Number of tokens that were thoughts."""
    is_thinking: bool = False
    """Whether the last piece was of thoughts."""
    echo: str = ""
    """The prompt, where the answer begins with it."""
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    """Log-probabilities of the prompt's tokens, if they were asked for; None for the first token."""
    prompt_ids: Sequence[int] = ()
    """Token ids of the prompt."""
    finish: FinishReason | None = None
    """Why it has ended, or None while it goes on."""
    stop: str | None = None
    """The stop string that has ended it, or None."""

    def add(self, piece: Piece) -> None:
        """Add what has come."""
        self.is_thinking = isinstance(piece, ThoughtPiece)
        match piece:
            case TextPiece(text):
                self.text += text
            case ThoughtPiece(text):
                self.thoughts += text
            case CallPiece(_, call_id, name, arguments, begins):
                if begins:
                    self.calls.append(AnsweredCall(call_id, name))
                self.calls[-1].arguments += arguments

    @property
    def calls_tools(self) -> bool:
        """Whether it has ended in order to call tools."""
        return bool(self.calls) and self.finish == "stop" and self.stop is None
