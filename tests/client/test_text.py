"""Stop strings: what is shown never holds one, and nothing else is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm_client.text import StopText

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
        shown += watch.rest()
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
