"""Stop strings: what is shown never holds one, and nothing else is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from treeswarm_client.generation.text_stream import StopText, TextStream

letters = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(letters, max_size=8), stops=stops)
def test_what_is_shown_is_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    watch, shown = StopText(tuple(stops)), ""
    for piece in pieces:
        shown += watch.add(piece)
        if watch.hit is not None:
            break
    else:
        shown += watch.flush()
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    if watch.hit is None:
        assert not ends
        assert shown == whole
    else:
        assert whole.startswith(shown + watch.hit)
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_stop_string_cut_anywhere_is_never_seen(cut: int) -> None:
    text, watch = "one END two", StopText(("END",))
    assert watch.add(text[:cut]) + watch.add(text[cut:]) == "one "
    assert watch.hit == "END"


def with_byte_fallback() -> Tokenizer:
    """As Llama 2's: spaces belong to words, and what is no word is spelt in bytes."""
    words = ["▁", "▁is", "▁Paris", "▁the", "!", "a", "</s>"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.add_special_tokens(["</s>"])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


BYTES = with_byte_fallback()
IS, PARIS, END = 257, 258, 262


@given(pieces=st.lists(st.sampled_from([" is", " the", "!", "a", "\n", "é", "漢", "😀", "</s>"]), max_size=24))
def test_text_in_bytes_is_shown_a_character_at_a_time(pieces: list[str]) -> None:
    known = {" is": [IS], " the": [259], "!": [260], "a": [261], "</s>": [END]}
    stream, shown = TextStream(BYTES, [PARIS]), ""
    for piece in pieces:
        for token in known.get(piece) or list(piece.encode()):
            shown += stream.add(token)
        assert shown == "".join(shown_piece for shown_piece in pieces if shown_piece != "</s>")[: len(shown)]
    assert shown == "".join(piece for piece in pieces if piece != "</s>")


@given(tokens=st.lists(st.integers(0, 262), max_size=60))
def test_bytes_that_are_no_text_end_nothing(tokens: list[int]) -> None:
    stream = TextStream(BYTES)
    shown = "".join(stream.add(token) for token in tokens)
    assert len(shown) <= sum(len(BYTES.decode([token])) + 1 for token in tokens)


def test_a_word_after_the_prompt_keeps_its_space() -> None:
    assert TextStream(BYTES, [IS]).add(PARIS) == " Paris"
