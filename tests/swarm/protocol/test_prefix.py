"""Prefix digests are equal for the same text and scope only, and a session begins on the rows that a prefix names."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.swarm.session.test_session import TERMS, append

from treeswarm.errors import Refused
from treeswarm.protocol.messages import Resumption
from treeswarm.protocol.prefix import DIGEST_BYTES, MAX_PREFIX_UNITS, PREFIX_TOKENS, SCOPE_BYTES, prefix_of, scope_at
from treeswarm.session.session import NodeSession

SCOPE = b"s" * SCOPE_BYTES
texts = st.lists(st.integers(0, 3), min_size=1, max_size=5 * PREFIX_TOKENS)


@settings(deadline=None)
@given(text=texts, more=texts)
def test_a_longer_text_begins_with_the_digests_of_a_shorter_one(text: list[int], more: list[int]) -> None:
    short, long = prefix_of(SCOPE, text), prefix_of(SCOPE, [*text, *more])
    assert long.digests[: len(short.digests)] == short.digests
    assert short.rows < len(text) <= short.rows + PREFIX_TOKENS
    assert all(len(digest) == DIGEST_BYTES for digest in long.digests)


@settings(deadline=None)
@given(place=st.integers(0, 3 * PREFIX_TOKENS - 1))
def test_a_changed_token_changes_all_digests_from_its_unit_on(place: int) -> None:
    text = [7] * (3 * PREFIX_TOKENS + 1)
    changed = [*text[:place], 8, *text[place + 1 :]]
    before, after = prefix_of(SCOPE, text).digests, prefix_of(SCOPE, changed).digests
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < place // PREFIX_TOKENS for i in range(3)]


def test_scopes_differ_by_secret_and_by_chain() -> None:
    chains = [["a"], ["b"], ["a", "b"], ["b", "a"], ["c", "a", "b"]]
    scopes = {scope_at(secret, chain) for secret in (b"x" * 16, b"y" * 16) for chain in chains}
    assert len(scopes) == 2 * len(chains)
    assert len({prefix_of(scope, [1] * 65).digests for scope in scopes}) == len(scopes)


def test_a_very_long_prompt_has_the_most_units_of_a_message() -> None:
    prompt = np.zeros((MAX_PREFIX_UNITS + 2) * PREFIX_TOKENS, np.int64).tolist()
    assert len(prefix_of(SCOPE, prompt).digests) == MAX_PREFIX_UNITS


# ---------------------------------------------------------------- what a node does with an offer


def offering(offered: int = 2 * PREFIX_TOKENS) -> NodeSession:
    """Return a new session whose node already has `offered` rows of the prompt."""
    terms = {**vars(TERMS), "trunk_room": 1000, "resumption": Resumption(0, 0), "offered": offered}
    return NodeSession(type(TERMS)(**terms))


@pytest.mark.parametrize("taken", [0, PREFIX_TOKENS, 2 * PREFIX_TOKENS])
def test_a_session_begins_with_the_offered_rows_that_are_taken(taken: int) -> None:
    session = offering()
    (step,) = session.receive(append(0, 1, [0, 1], prefill=True, prefix=taken))
    assert (step.trunk_length, step.positions.tolist()) == (taken, [taken, taken + 1])
    assert (session.tree.trunk_length, session.offered) == (taken + 2, 0)
    (step,) = session.receive(append(1, 3, [2, 3]))
    assert step.positions.tolist() == [taken + 2, taken + 3]


@pytest.mark.parametrize("taken", [1, PREFIX_TOKENS + 1, 3 * PREFIX_TOKENS])
def test_taking_rows_that_were_not_offered_is_refused(taken: int) -> None:
    with pytest.raises(Refused, match="were offered") as refused:
        offering().receive(append(0, 1, [0, 1], prefill=True, prefix=taken))
    assert refused.value.code == "malformed"


def test_an_offer_holds_for_the_very_first_append_only() -> None:
    session = offering()
    session.receive(append(0, 1, [0, 1], prefill=True))
    with pytest.raises(Refused, match="0 were offered"):
        session.receive(append(1, 3, [2, 3], prefill=True, prefix=PREFIX_TOKENS))
    session = offering()
    session.resume(2, Resumption(0, 5))
    with pytest.raises(Refused, match="0 were offered"):
        session.receive(append(0, 6, [5], prefill=True, prefix=PREFIX_TOKENS, epoch=2))
