"""The log-probabilities of an answer's tokens, as OpenAI's objects.  Pure."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm_client.gateway.answers.pieces import ChoiceAnswer
from treeswarm_client.gateway.answers.token_text import TokenBytes, readable
from treeswarm_client.generation.run import Token
from treeswarm_client.generation.token_logprobs import TopLogprobs


@dataclass
class ShownTokens:
    """Hands out a text's tokens as their bytes are shown, so that the bytes handed out are those of the text.

    A token that ends inside a character waits for the rest, one that may begin a stop string until it is shown or cut
    off: of a token that the end cuts, the part within the text is handed out.
    """

    token_bytes: TokenBytes
    _waiting: deque[tuple[Token, bytes]] = field(default_factory=deque)
    _shown: int = 0
    """Number of bytes that are shown but not handed out."""

    def add(self, token: Token) -> list[tuple[Token, bytes]]:
        """Return the tokens that are wholly shown now that `token` has come, with their bytes."""
        self._waiting.append((token, self.token_bytes.of(token.id)))
        self._shown += len(token.text.encode(errors="replace"))
        ready = []
        while self._waiting and self._shown and len(self._waiting[0][1]) <= self._shown:
            self._shown -= len(self._waiting[0][1])
            ready.append(self._waiting.popleft())
        return ready

    def end(self) -> list[tuple[Token, bytes]]:
        """Return the token that the end of the text cuts, with its bytes within the text, if there is one."""
        if not self._waiting or not self._shown:
            return []
        token, data = self._waiting.popleft()
        return [(token, data[: self._shown])]


def chat_logprobs(tokens: Sequence[tuple[Token, bytes]], token_bytes: TokenBytes) -> dict[str, Any]:
    """Return the object `logprobs` of a chat's choice."""
    content = [
        _entry(data, token.logprob)
        | {"top_logprobs": [_entry(token_bytes.of(one), value) for one, value in token.top_logprobs]}
        for token, data in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": readable(data), "logprob": float(logprob), "bytes": list(data)}


@dataclass
class CompletionLogprobs:
    """Writes the object `logprobs` of completions, whose offsets count characters of the text."""

    token_bytes: TokenBytes
    offset: int = 0
    """Number of characters of the text so far."""
    _pending: bytes = b""
    """Bytes of a character that is not complete."""

    def of(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Return an object for each of the next tokens: for those after the end of the text as well."""
        return [self._one(token.id, token.logprob, token.top_logprobs) for token in tokens]

    def of_prompt(self, answer: ChoiceAnswer) -> list[dict[str, Any]]:
        """Return an object for each token of the prompt, if the answer begins with it; the first one has no value."""
        if not answer.echo:
            return []
        scores = answer.prompt_logprobs or [None] * len(answer.prompt_ids)
        # SentencePiece's tokens begin with a space that the text does not have.
        spaced = b"".join(map(self.token_bytes.of, answer.prompt_ids)).startswith(b" ")
        self.offset = -1 if spaced and not answer.echo.startswith(" ") else 0
        return [
            self._one(token, None if score is None else score.logprob, () if score is None else score.top)
            for token, score in zip(answer.prompt_ids, scores, strict=True)
        ]

    def _one(self, token: int, logprob: float | None, top: TopLogprobs) -> dict[str, Any]:
        data = self.token_bytes.of(token)
        offset = max(0, self.offset)
        self._advance(data)
        # The token's own value is that among the likeliest, so that programs can tell whether it is the likeliest.
        own = dict(top).get(token, logprob)
        values: dict[str, float] = {}
        for one, value in (*top, *(() if own is None else ((token, own),))):
            values.setdefault(readable(self.token_bytes.of(one), "bytes:"), value)
        return {
            "tokens": [readable(data, "bytes:")],
            "token_logprobs": [own],
            "top_logprobs": [values if top else None],
            "text_offset": [offset],
        }

    def _advance(self, data: bytes) -> None:
        whole = (self._pending + data).decode("utf-8", "ignore")
        self.offset += len(whole)
        text = whole.encode()
        self._pending = (self._pending + data)[len(text) :] if (self._pending + data).startswith(text) else b""


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one object `logprobs` for the objects of single tokens."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    whole: dict[str, Any] = {name: [value for part in parts for value in part[name]] for name in names}
    return whole if any(whole["top_logprobs"]) else whole | {"top_logprobs": None}
