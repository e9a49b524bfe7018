"""Masks of tokens as packed bits, as grammar libraries write them.  Pure."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint32]
"""Allowed tokens, uint32 [words] or [rows, words]: token t is bit t mod 32 of word t div 32."""


def mask_words(vocab_size: int) -> int:
    """Return the number of words of a mask."""
    return -(-vocab_size // 32)


def set_token(mask: Mask, token: int) -> None:
    """Allow a token in one row's mask."""
    mask[token // 32] |= np.uint32(1 << token % 32)


def clear_token(mask: Mask, token: int) -> None:
    """Forbid a token in one row's mask."""
    mask[token // 32] &= ~np.uint32(1 << token % 32)


def has_token(mask: Mask, token: int) -> bool:
    """Return whether one row's mask allows a token."""
    return bool(int(mask[token // 32]) >> token % 32 & 1)


def only_token(mask: Mask) -> int | None:
    """Return the one token that a row's mask allows, or None if it allows several or none."""
    words = np.flatnonzero(mask)
    if len(words) != 1:
        return None
    word = int(mask[words[0]])
    return int(words[0]) * 32 + word.bit_length() - 1 if word & (word - 1) == 0 else None


def allowed_tokens(mask: Mask) -> NDArray[np.int64]:
    """Return the ids of the tokens that one row's mask allows, int64 [tokens]."""
    return np.flatnonzero(np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little"))
