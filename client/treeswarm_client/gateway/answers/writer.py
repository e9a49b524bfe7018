"""What writes the answers of one API, and the frames of server-sent events."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from treeswarm_client.gateway.answers.pieces import ChoiceAnswer, Piece
from treeswarm_client.gateway.errors import Failure
from treeswarm_client.gateway.events import Usage
from treeswarm_client.generation.run import Token


@dataclass(frozen=True)
class AnswerMetadata:
    """What all objects of one answer have in common."""

    id: str
    created: int
    """Time of creation, in seconds since 1970."""
    model: str
    fingerprint: str
    """Value of `system_fingerprint`: the weights and the dtype that compute."""


class AnswerWriter(Protocol):
    """Writes the objects of one kind of answer, whole or as events of a stream."""

    last_frame: str
    """Frame that ends every stream, or an empty string."""

    def whole(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> dict[str, Any]:
        """Return the whole answer as one object."""
        ...

    def begin(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[dict[str, Any]]:
        """Return the events that open a stream; `answers` will have what comes, and `usage` counts the prompts."""
        ...

    def token(self, choice: int, token: Token, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """Return the events for one more token of a choice, and the pieces that it completes."""
        ...

    def end_choice(self, choice: int, answer: ChoiceAnswer, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """Return the events for a choice's last pieces and its end; `answer` is all of it."""
        ...

    def end(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[dict[str, Any]]:
        """Return the events that end a stream."""
        ...

    def fail(self, failure: Failure) -> Iterator[dict[str, Any]]:
        """Return the events for an error after the beginning of a stream."""
        ...

    def frame(self, event: dict[str, Any]) -> str:
        """Return an event as a frame of the stream."""
        ...


def data_frame(event: dict[str, Any]) -> str:
    """Return an event without a name as a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


def named_frame(event: dict[str, Any]) -> str:
    """Return an event whose `type` is its name as a server-sent event."""
    return f"event: {event['type']}\n{data_frame(event)}"
