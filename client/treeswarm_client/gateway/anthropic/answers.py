"""Anthropic's answers, whole or as the events of a stream.  Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm_client.gateway.answers.pieces import CallPiece, ChoiceAnswer, Piece, TextPiece, ThoughtPiece
from treeswarm_client.gateway.answers.writer import AnswerMetadata, named_frame
from treeswarm_client.gateway.anthropic.errors import error_body
from treeswarm_client.gateway.errors import Failure
from treeswarm_client.gateway.events import Usage
from treeswarm_client.gateway.parameters.conversations import parse_arguments
from treeswarm_client.generation.run import Token

Event = dict[str, Any]


@dataclass(eq=False)
class MessageWriter:
    """Writes a `message` and the events of its stream: blocks of text, thoughts and calls, one after the other."""

    metadata: AnswerMetadata
    max_tokens: int | None
    """Number of tokens that the request asks for."""
    last_frame: str = ""
    _open: str | None = None
    """What the block is that goes on: `text`, `thinking` or the id of a call; None where none does."""
    _blocks: int = field(default=0)
    """Number of blocks that have begun."""

    def whole(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Event:
        (answer,) = answers
        return self._message(_content(answer), usage, answer)

    def begin(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[Event]:
        yield {"type": "message_start", "message": self._message([], usage, ChoiceAnswer())}

    def token(self, choice: int, token: Token, pieces: Sequence[Piece]) -> Iterator[Event]:
        for piece in pieces:
            yield from self._piece(piece)

    def end_choice(self, choice: int, answer: ChoiceAnswer, pieces: Sequence[Piece]) -> Iterator[Event]:
        for piece in pieces:
            yield from self._piece(piece)
        yield from self._close()

    def end(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[Event]:
        (answer,) = answers
        yield {"type": "message_delta", "delta": self._stop_of(answer), "usage": _usage(usage)}
        yield {"type": "message_stop"}

    def fail(self, failure: Failure) -> Iterator[Event]:
        yield error_body(failure)

    def frame(self, event: Event) -> str:
        return named_frame(event)

    def _piece(self, piece: Piece) -> Iterator[Event]:
        match piece:
            case TextPiece(text):
                yield from self._go_on("text", {"type": "text", "text": ""}, {"type": "text_delta", "text": text})
            case ThoughtPiece(text):
                thoughts = {"type": "thinking", "thinking": "", "signature": ""}
                yield from self._go_on("thinking", thoughts, {"type": "thinking_delta", "thinking": text})
            case CallPiece(_, call_id, name, arguments, _):
                block: Event = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                yield from self._go_on(call_id, block, {"type": "input_json_delta", "partial_json": arguments})

    def _go_on(self, kind: str, block: Event, delta: Event) -> Iterator[Event]:
        if self._open != kind:
            yield from self._close()
            self._open, self._blocks = kind, self._blocks + 1
            yield {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}
        yield {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _close(self) -> Iterator[Event]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._blocks - 1}

    def _message(self, content: list[Event], usage: Usage, answer: ChoiceAnswer) -> Event:
        return {
            "id": self.metadata.id,
            "type": "message",
            "role": "assistant",
            "model": self.metadata.model,
            "content": content,
            **self._stop_of(answer),
            "usage": _usage(usage),
        }

    def _stop_of(self, answer: ChoiceAnswer) -> Event:
        if answer.finish is None:
            return {"stop_reason": None, "stop_sequence": None}
        if answer.calls_tools:
            reason = "tool_use"
        elif answer.finish == "length":
            fits = len(answer.tokens) >= (self.max_tokens or 0)
            reason = "max_tokens" if fits else "model_context_window_exceeded"
        else:
            reason = "end_turn" if answer.stop is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": answer.stop}


def _content(answer: ChoiceAnswer) -> list[Event]:
    thoughts = [{"type": "thinking", "thinking": answer.thoughts, "signature": ""}] if answer.thoughts else []
    text = [{"type": "text", "text": answer.text}] if answer.text else []
    calls = [
        {"type": "tool_use", "id": call.call_id, "name": call.name, "input": parse_arguments(call.arguments)}
        for call in answer.calls
    ]
    return [*thoughts, *text, *calls]


def _usage(usage: Usage) -> Event:
    """Count tokens as Anthropic does: those that were in a cache are not among the input's."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }
