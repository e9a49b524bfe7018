"""Text as it streams: stop strings are never shown, and nothing else is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from treeswarm_client.generation.text_stream import StopText, TextStream

letters = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(letters, max_size=8), stops=stops)
def test_shown_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    stop_text, shown = StopText(tuple(stops)), ""
    for piece in pieces:
        shown += stop_text.add(piece)
        if stop_text.hit is not None:
            break
    else:
        shown += stop_text.flush()
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    if stop_text.hit is None:
        assert not ends
        assert shown == whole
    else:
        assert whole.startswith(shown + stop_text.hit)
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_stop_string_cut_anywhere_is_never_shown(cut: int) -> None:
    text, stop_text = "one END two", StopText(("END",))
    assert stop_text.add(text[:cut]) + stop_text.add(text[cut:]) == "one "
    assert stop_text.hit == "END"


def with_byte_fallback() -> Tokenizer:
    """Return a tokenizer like Llama 2's: spaces belong to words, and what is no word is spelt in bytes."""
    words = ["▁", "▁is", "▁Paris", "▁the", "!", "a", "</s>"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES = with_byte_fallback()
IS, PARIS, END = 257, 258, 262


@given(pieces=st.lists(st.sampled_from([" is", " the", "!", "a", "\n", "é", "漢", "😀", "</s>"]), max_size=24))
def test_text_in_bytes_is_shown_character_by_character(pieces: list[str]) -> None:
    ids_of_words = {" is": [IS], " the": [259], "!": [260], "a": [261], "</s>": [END]}
    stream, shown = TextStream(BYTES, [PARIS]), ""
    for piece in pieces:
        for token in ids_of_words.get(piece) or list(piece.encode()):
            shown += stream.add(token)
        assert shown == "".join(shown_piece for shown_piece in pieces if shown_piece != "</s>")[: len(shown)]
    assert shown == "".join(piece for piece in pieces if piece != "</s>")


@given(tokens=st.lists(st.integers(0, 262), max_size=60))
def test_bytes_that_are_no_text_do_not_raise(tokens: list[int]) -> None:
    stream = TextStream(BYTES)
    shown = "".join(stream.add(token) for token in tokens)
    assert len(shown) <= sum(len(BYTES.decode([token])) + 1 for token in tokens)


def test_a_word_after_the_prompt_keeps_its_space() -> None:
    assert TextStream(BYTES, [IS]).add(PARIS) == " Paris"
