"""The log-probabilities of an answer's tokens, as OpenAI's objects.  Pure."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm_client.gateway.answers.token_text import TokenBytes, readable
from treeswarm_client.generation.run import Token


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


def chat_logprobs(tokens: Sequence[tuple[Token, bytes]]) -> dict[str, Any]:
    """Return the object `logprobs` of a chat's choice."""
    return {"content": [_entry(token, data) for token, data in tokens], "refusal": None}


def _entry(token: Token, data: bytes) -> dict[str, Any]:
    return {"token": readable(data), "logprob": float(token.logprob), "bytes": list(data), "top_logprobs": []}


@dataclass
class CompletionLogprobs:
    """Writes the object `logprobs` of completions, whose offsets count characters of the text."""

    token_bytes: TokenBytes
    offset: int = 0
    """Number of characters of the text so far."""
    _pending: bytes = b""
    """Bytes of a character that is not complete."""

    def of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the object for the next tokens, all of them: those after the end of the text as well."""
        names, offsets = [], []
        for token in tokens:
            data = self.token_bytes.of(token.id)
            names.append(readable(data, "bytes:"))
            offsets.append(self.offset)
            self._advance(data)
        return {
            "tokens": names,
            "token_logprobs": [float(token.logprob) for token in tokens],
            "top_logprobs": None,
            "text_offset": offsets,
        }

    def _advance(self, data: bytes) -> None:
        whole = (self._pending + data).decode("utf-8", "ignore")
        self.offset += len(whole)
        text = whole.encode()
        self._pending = (self._pending + data)[len(text) :] if (self._pending + data).startswith(text) else b""
