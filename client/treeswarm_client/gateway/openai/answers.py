"""The answers to callers: OpenAI's objects, whole or as the chunks of a stream.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from treeswarm_client.gateway.events import Usage
from treeswarm_client.gateway.token_text import Decode, bytes_of, token_text
from treeswarm_client.generation.loop import FinishReason
from treeswarm_client.generation.run import Run, Token


@dataclass(frozen=True)
class AnswerMetadata:
    """What all objects of one answer have in common."""

    id: str
    created: int
    """Time of creation, in seconds since 1970."""
    model: str
    fingerprint: str
    """Value of `system_fingerprint`."""


class AnswerWriter(Protocol):
    """Writes the objects of one kind of answer."""

    def answer(self, runs: Sequence[Run], usage: Usage) -> dict[str, Any]:
        """Return the whole answer as one object."""
        ...

    def first_chunk(self, choice: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice, or None if its text comes at once."""
        ...

    def token_chunk(self, choice: int, token: Token) -> dict[str, Any]:
        """Return the chunk of one token."""
        ...

    def finish_chunk(self, choice: int, finish: FinishReason) -> dict[str, Any]:
        """Return the chunk that ends a choice."""
        ...

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the last chunk of a stream, which counts its tokens."""
        ...


@dataclass(frozen=True)
class ChatWriter:
    """Writes `chat.completion` and its chunks."""

    metadata: AnswerMetadata
    decode: Decode
    logprobs: bool

    def answer(self, runs: Sequence[Run], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": run.text, "refusal": None},
                "logprobs": self._logprobs(run.token_ids, run.logprobs),
                "finish_reason": run.finish_reason,
            }
            for index, run in enumerate(runs)
        ]
        return _object(self.metadata, "chat.completion", choices) | {"usage": _usage(usage)}

    def first_chunk(self, choice: int) -> dict[str, Any] | None:
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def token_chunk(self, choice: int, token: Token) -> dict[str, Any]:
        return self._chunk(choice, {"content": token.text}, self._logprobs([token.id], [token.logprob]))

    def finish_chunk(self, choice: int, finish: FinishReason) -> dict[str, Any]:
        return self._chunk(choice, {}, None, finish)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return _object(self.metadata, "chat.completion.chunk", []) | {"usage": _usage(usage)}

    def _chunk(
        self, choice: int, delta: dict[str, Any], logprobs: Any = None, finish: FinishReason | None = None
    ) -> dict[str, Any]:
        content = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _object(self.metadata, "chat.completion.chunk", [content])

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        texts = [token_text(token, self.decode) for token in ids]
        return {
            "content": [
                {"token": text, "logprob": float(logprob), "bytes": bytes_of(text), "top_logprobs": []}
                for text, logprob in zip(texts, logprobs, strict=True)
            ],
            "refusal": None,
        }


@dataclass(eq=False)
class CompletionWriter:
    """Writes `text_completion` objects, whole and as chunks."""

    metadata: AnswerMetadata
    decode: Decode
    logprobs: bool
    _lengths: dict[int, int] = field(default_factory=dict)
    """Number of characters of each choice's tokens so far."""

    def answer(self, runs: Sequence[Run], usage: Usage) -> dict[str, Any]:
        choices = [
            _text_choice(index, run.text, self._logprobs(run.token_ids, run.logprobs), run.finish_reason)
            for index, run in enumerate(runs)
        ]
        return _object(self.metadata, "text_completion", choices) | {"usage": _usage(usage)}

    def first_chunk(self, choice: int) -> dict[str, Any] | None:
        return None

    def token_chunk(self, choice: int, token: Token) -> dict[str, Any]:
        start = self._lengths.get(choice, 0)
        logprobs = self._logprobs([token.id], [token.logprob], start)
        if logprobs is not None:
            self._lengths[choice] = start + len(logprobs["tokens"][0])
        return _object(self.metadata, "text_completion", [_text_choice(choice, token.text, logprobs)])

    def finish_chunk(self, choice: int, finish: FinishReason) -> dict[str, Any]:
        return _object(self.metadata, "text_completion", [_text_choice(choice, "", None, finish)])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return _object(self.metadata, "text_completion", []) | {"usage": _usage(usage)}

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[float], start: int = 0) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        texts = [token_text(token, self.decode) for token in ids]
        *offsets, _ = accumulate(map(len, texts), initial=start)
        values = [float(logprob) for logprob in logprobs]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


def _object(metadata: AnswerMetadata, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": metadata.id,
        "object": kind,
        "created": metadata.created,
        "model": metadata.model,
        "system_fingerprint": metadata.fingerprint,
        "choices": choices,
    }


def _text_choice(index: int, text: str, logprobs: Any, finish: FinishReason | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
