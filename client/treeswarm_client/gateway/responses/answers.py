"""OpenAI's responses, whole or as the numbered events of a stream.  Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm_client.gateway.answers.pieces import CallPiece, ChoiceAnswer, Piece, TextPiece, ThoughtPiece
from treeswarm_client.gateway.answers.token_text import TokenBytes
from treeswarm_client.gateway.answers.writer import AnswerMetadata, named_frame
from treeswarm_client.gateway.errors import Failure
from treeswarm_client.gateway.events import Usage
from treeswarm_client.gateway.openai.logprobs import ShownTokens, chat_logprobs
from treeswarm_client.generation.run import Token

Event = dict[str, Any]
# Parameters that a response repeats, and what they are where the request does not name them.
REPEATED: Mapping[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": None,
    "truncation": "disabled", "user": None,
}  # fmt: skip


@dataclass(eq=False)
class ResponseWriter:
    """Writes a `response` and the events of its stream: items of text, thoughts and calls, one after the other."""

    metadata: AnswerMetadata
    body: Mapping[str, Any]
    """The request, parts of which the response repeats."""
    token_bytes: TokenBytes | None
    """The bytes of tokens, or None if the answer has no log-probabilities."""
    last_frame: str = ""
    _events: int = 0
    """Number of events so far."""
    _items: list[Event] = field(default_factory=list)
    """The items so far, of which the last may still go on."""
    _open: str | None = None
    """What the last item is while it goes on: `text`, `thoughts` or the id of a call; None where none does."""
    _shown: ShownTokens | None = None
    _logprobs: list[Event] = field(default_factory=list)
    """Log-probabilities that no event has taken along."""

    def __post_init__(self) -> None:
        self._shown = ShownTokens(self.token_bytes) if self.token_bytes is not None else None

    def whole(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Event:
        (answer,) = answers
        for token in answer.tokens:
            self._take_logprobs(token)
        if self._shown is not None:
            self._logprobs += chat_logprobs(self._shown.end(), self._shown.token_bytes)["content"]
        for piece in _pieces_of(answer):
            for _ in self._piece(piece):
                pass
        for _ in self._close():
            pass
        return self._response(answer, usage)

    def begin(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[Event]:
        response = self._response(ChoiceAnswer(), None)
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)

    def token(self, choice: int, token: Token, pieces: Sequence[Piece]) -> Iterator[Event]:
        self._take_logprobs(token)
        for piece in pieces:
            yield from self._piece(piece)

    def end_choice(self, choice: int, answer: ChoiceAnswer, pieces: Sequence[Piece]) -> Iterator[Event]:
        if self._shown is not None:
            self._logprobs += chat_logprobs(self._shown.end(), self._shown.token_bytes)["content"]
        for piece in pieces:
            yield from self._piece(piece)
        yield from self._close(complete=answer.finish != "length")

    def end(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[Event]:
        response = self._response(answers[0], usage)
        yield self._event(f"response.{response['status']}", response=response)

    def fail(self, failure: Failure) -> Iterator[Event]:
        error = {"code": failure.code or failure.kind, "message": failure.message}
        response = self._response(ChoiceAnswer(), None) | {"status": "failed", "error": error}
        yield self._event("response.failed", response=response)

    def frame(self, event: Event) -> str:
        return named_frame(event)

    def _take_logprobs(self, token: Token) -> None:
        if self._shown is not None:
            self._logprobs += chat_logprobs(self._shown.add(token), self._shown.token_bytes)["content"]

    def _piece(self, piece: Piece) -> Iterator[Event]:
        match piece:
            case TextPiece(text):
                if self._open != "text":
                    yield from self._close()
                    yield from self._begin("text", {"type": "message", "role": "assistant", "content": []}, "msg")
                    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                    yield from self._begin_part(part)
                part = self._items[-1]["content"][0]
                logprobs, self._logprobs = self._logprobs, []
                part["text"] += text
                part["logprobs"] = part["logprobs"] + logprobs
                yield self._of_part("response.output_text.delta", delta=text, logprobs=logprobs)
            case ThoughtPiece(text):
                if self._open != "thoughts":
                    yield from self._close()
                    yield from self._begin("thoughts", {"type": "reasoning", "summary": [], "content": []}, "rs")
                    yield from self._begin_part({"type": "reasoning_text", "text": ""})
                self._items[-1]["content"][0]["text"] += text
                yield self._of_part("response.reasoning_text.delta", delta=text)
            case CallPiece(_, call_id, name, arguments, _):
                if self._open != call_id:
                    yield from self._close()
                    call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                    yield from self._begin(call_id, call, "fc")
                self._items[-1]["arguments"] += arguments
                yield self._of_item("response.function_call_arguments.delta", delta=arguments)

    def _begin(self, kind: str, item: Event, prefix: str) -> Iterator[Event]:
        number = len(self._items)
        item_id = f"{prefix}_{self.metadata.id.partition('_')[2]}{number:02d}"
        self._items.append({"id": item_id, **item, "status": "in_progress"})
        self._open = kind
        yield self._event("response.output_item.added", output_index=number, item=_copy(self._items[-1]))

    def _begin_part(self, part: Event) -> Iterator[Event]:
        self._items[-1]["content"].append(part)
        yield self._of_part("response.content_part.added", part=dict(part))

    def _close(self, *, complete: bool = True) -> Iterator[Event]:
        """End the item that goes on, if one does."""
        if self._open is None:
            return
        self._open, item = None, self._items[-1]
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **done)
        else:
            part = item["content"][0]
            if item["type"] == "message":
                part["logprobs"] = part["logprobs"] + self._logprobs
                self._logprobs = []
                done = {"text": part["text"], "logprobs": part["logprobs"]}
                yield self._of_part("response.output_text.done", **done)
            else:
                yield self._of_part("response.reasoning_text.done", text=part["text"])
            yield self._of_part("response.content_part.done", part=dict(part))
        item["status"] = "completed" if complete else "incomplete"
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=_copy(item))

    def _of_part(self, kind: str, **values: Any) -> Event:
        return self._of_item(kind, content_index=0, **values)

    def _of_item(self, kind: str, **values: Any) -> Event:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **values)

    def _event(self, kind: str, **values: Any) -> Event:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **values}

    def _response(self, answer: ChoiceAnswer, usage: Usage | None) -> Event:
        status = {None: "in_progress", "stop": "completed", "length": "incomplete"}[answer.finish]
        given = {name: value for name in REPEATED if (value := self.body.get(name)) is not None}
        return {
            "id": self.metadata.id,
            "object": "response",
            "created_at": self.metadata.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.metadata.model,
            "output": [_copy(item) for item in self._items],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "usage": _usage(usage, answer.thought_tokens) if usage is not None else None,
            **REPEATED,
            **given,
        }


def _copy(item: Event) -> Event:
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)


def _pieces_of(answer: ChoiceAnswer) -> Iterator[Piece]:
    if answer.thoughts:
        yield ThoughtPiece(answer.thoughts)
    if answer.text or not answer.calls:
        yield TextPiece(answer.text)
    for index, call in enumerate(answer.calls):
        yield CallPiece(index, call.call_id, call.name, call.arguments, begins=True)


def _usage(usage: Usage, thought_tokens: int) -> Event:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": thought_tokens},
        "total_tokens": usage.prompt + usage.completion,
    }
