"""The text and the bytes of single tokens.  Pure."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

Decode = Callable[[Sequence[int]], str]
"""A function that turns token ids into text."""
# A token that stands for one byte, in tokenizers that fall back to bytes.
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Stands for a space in tokens of SentencePiece.
SPACE = "\u2581"


def token_text(token: int, decode: Decode) -> str:
    """Return what a token adds to a text.

    Decoded alone, a token may lack the space before it, so it is decoded after a copy of itself.
    """
    return decode([token, token])[len(decode([token])) :]


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of a tokenizer's tokens: of those that end inside a character, too."""

    tokenizer: Tokenizer

    def of(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; a special token adds none."""
        name = self.tokenizer.id_to_token(token)
        if name is None or token in self._special:  # the head may have rows that the tokenizer has no tokens for
            return b""
        if token in self._added:
            return name.encode()
        if self._is_byte_level:
            return bytes(BYTES_OF_LETTERS[letter] for letter in name if letter in BYTES_OF_LETTERS)
        if byte := BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if self._has_marked_spaces:
            return name.replace(SPACE, " ").encode()
        return token_text(token, self._decode).encode()

    @cached_property
    def _decoders(self) -> set[str]:
        """Kinds of the tokenizer's decoders, those within a sequence included."""
        decoder = self.tokenizer.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {}
        return {part.get("type", "") for part in (state, *state.get("decoders", ()))}

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in self._decoders

    @cached_property
    def _has_marked_spaces(self) -> bool:
        return bool(self._decoders & {"Metaspace", "ByteFallback"})

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, content in added.items() if content.special)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def _bytes_of_letters() -> dict[str, int]:
    """Return the byte for which each letter of a byte-level vocabulary stands.

    Bytes that are printable letters of Latin-1 stand for themselves, the others for the letters from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES_OF_LETTERS = _bytes_of_letters()


def readable(data: bytes, prefix: str = "") -> str:
    r"""Return a token's bytes as text, or as `\x` escapes after `prefix` where they are no whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
