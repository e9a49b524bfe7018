"""What callers get: OpenAI's objects, whole or as a stream's chunks.  Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from treeswarm_client.gateway.events import Usage
from treeswarm_client.generation.loop import FinishReason
from treeswarm_client.generation.run import Run, Token

Decode = Callable[[Sequence[int]], str]


def token_text(token: int, decode: Decode) -> str:
    """What a token adds to a text.  Alone it may lack the space before it, so it is read after itself."""
    return decode([token, token])[len(decode([token])) :]


@dataclass(frozen=True)
class AnswerMetadata:
    """What all objects of one answer have in common."""

    id: str
    created: int
    model: str
    fingerprint: str


class AnswerWriter(Protocol):
    """Writes one kind of answer."""

    def whole(self, runs: Sequence[Run], usage: Usage) -> dict[str, Any]: ...

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk of a choice, if there is one before its text."""
        ...

    def more(self, choice: int, token: Token) -> dict[str, Any]: ...

    def closing(self, choice: int, finish: FinishReason) -> dict[str, Any]: ...

    def usage(self, usage: Usage) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ChatWriter:
    """`chat.completion` and its chunks."""

    heading: AnswerMetadata
    decode: Decode
    logprobs: bool

    def whole(self, runs: Sequence[Run], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": run.text, "refusal": None},
                "logprobs": self._logprobs(run.token_ids, run.logprobs),
                "finish_reason": run.finish_reason,
            }
            for index, run in enumerate(runs)
        ]
        return _object(self.heading, "chat.completion", choices) | {"usage": _usage(usage)}

    def opening(self, choice: int) -> dict[str, Any] | None:
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def more(self, choice: int, token: Token) -> dict[str, Any]:
        return self._chunk(choice, {"content": token.text}, self._logprobs([token.id], [token.logprob]))

    def closing(self, choice: int, finish: FinishReason) -> dict[str, Any]:
        return self._chunk(choice, {}, None, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return _object(self.heading, "chat.completion.chunk", []) | {"usage": _usage(usage)}

    def _chunk(
        self, choice: int, delta: dict[str, Any], logprobs: Any = None, finish: FinishReason | None = None
    ) -> dict[str, Any]:
        made = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _object(self.heading, "chat.completion.chunk", [made])

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        tokens = [token_text(token, self.decode) for token in ids]
        return {
            "content": [
                {"token": text, "logprob": float(logprob), "bytes": bytes_of(text), "top_logprobs": []}
                for text, logprob in zip(tokens, logprobs, strict=True)
            ],
            "refusal": None,
        }


@dataclass(eq=False)
class CompletionWriter:
    """`text_completion`, whole and in chunks."""

    heading: AnswerMetadata
    decode: Decode
    logprobs: bool
    _said: dict[int, int] = field(default_factory=dict)
    """Letters of each choice's tokens so far."""

    def whole(self, runs: Sequence[Run], usage: Usage) -> dict[str, Any]:
        choices = [
            _text(index, run.text, self._logprobs(run.token_ids, run.logprobs), run.finish_reason)
            for index, run in enumerate(runs)
        ]
        return _object(self.heading, "text_completion", choices) | {"usage": _usage(usage)}

    def opening(self, choice: int) -> dict[str, Any] | None:
        return None

    def more(self, choice: int, token: Token) -> dict[str, Any]:
        start = self._said.get(choice, 0)
        logprobs = self._logprobs([token.id], [token.logprob], start)
        if logprobs is not None:
            self._said[choice] = start + len(logprobs["tokens"][0])
        return _object(self.heading, "text_completion", [_text(choice, token.text, logprobs)])

    def closing(self, choice: int, finish: FinishReason) -> dict[str, Any]:
        return _object(self.heading, "text_completion", [_text(choice, "", None, finish)])

    def usage(self, usage: Usage) -> dict[str, Any]:
        return _object(self.heading, "text_completion", []) | {"usage": _usage(usage)}

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[float], start: int = 0) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        tokens = [token_text(token, self.decode) for token in ids]
        *offsets, _ = accumulate(map(len, tokens), initial=start)
        said = [float(logprob) for logprob in logprobs]
        return {"tokens": tokens, "token_logprobs": said, "top_logprobs": None, "text_offset": offsets}


def _object(heading: AnswerMetadata, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": heading.id,
        "object": kind,
        "created": heading.created,
        "model": heading.model,
        "system_fingerprint": heading.fingerprint,
        "choices": choices,
    }


def _text(index: int, text: str, logprobs: Any, finish: FinishReason | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def bytes_of(text: str) -> list[int] | None:
    """None where the token is part of a character, and has no text of its own."""
    return None if "\ufffd" in text else list(text.encode())
