"""Each admission limit refuses the requests past it, under the right code, and no request before it."""

from dataclasses import replace
from typing import Any

import pytest

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import Refused
from treeswarm.protocol.messages import MAX_CROWN, NextHop, NumericsClass, Open, Resumption
from treeswarm.protocol.prefix import Prefix
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm_node.config import NodeLimits
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.sessions.admission import check_open

NUMERICS = NumericsClass("ab" * 32, "float32")
SERVED = ServedSpan(Span(2, 5), 8, 100, 16, 512, "cd" * 32, NUMERICS, "test", 64)
NEXT_HOP = NextHop("127.0.0.1:9", b"t" * 16)
VALID = Open(PROTOCOL_VERSION, b"s" * 16, 0, Span(2, 5), NUMERICS, 512, MAX_CROWN, b"t" * 16, NEXT_HOP)
LIMITS = NodeLimits(sessions=4, sessions_per_host=2)


def check(
    request: Open = VALID,
    served: ServedSpan = SERVED,
    state: NodeState = NodeState.ONLINE,
    session_hosts: tuple[str, ...] = (),
) -> None:
    check_open(request, served, LIMITS, state, "10.0.0.1", session_hosts)


@pytest.mark.parametrize(
    "opening",
    [
        VALID,
        replace(VALID, span=Span(3, 4)),
        replace(VALID, resumption=Resumption(512, 9)),
        replace(VALID, trunk_room=1, crown_room=1),
        replace(VALID, prefix=Prefix(b"s" * 16, (b"d" * 16,) * 7)),
    ],
    ids=["whole span", "part of the span", "resumption", "one row", "prefix"],
)
def test_valid_requests_are_granted(opening: Open) -> None:
    check(opening)
    check(opening, session_hosts=("10.0.0.1", "10.0.0.2", "10.0.0.2"))


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"version": PROTOCOL_VERSION + 1}, "wrong-version", "install the same release"),
        ({"numerics": replace(NUMERICS, dtype="bfloat16")}, "mismatch", "in float32"),
        ({"numerics": replace(NUMERICS, weights="ef" * 32)}, "mismatch", r"weights differ \(abab"),
        ({"span": Span(1, 5)}, "mismatch", "serves blocks 2:5, not 1:5"),
        ({"span": Span(2, 6)}, "mismatch", "serves blocks 2:5"),
        ({"next_hop": None}, "mismatch", "no next hop"),
        ({"trunk_room": 513}, "out-of-room", "context is 512"),
        ({"crown_room": MAX_CROWN + 1}, "out-of-room", "a crown has at most"),
        ({"prefix": Prefix(b"s" * 16, (b"d" * 16,) * 8)}, "out-of-room", "begin with more tokens than it has room"),
        ({"resumption": Resumption(513, 9)}, "out-of-room", "more tokens than it has room for"),
    ],
    ids=str,
)
def test_invalid_requests_are_refused_with_their_code(changes: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        check(replace(VALID, **changes))
    assert refused.value.code == code


def test_only_the_node_with_the_last_block_has_no_next_hop() -> None:
    tail = replace(SERVED, span=Span(5, 8))
    check(replace(VALID, span=Span(5, 8), next_hop=None), tail)
    check(replace(VALID, span=Span(5, 7)), tail)
    with pytest.raises(Refused, match="no next hop"):
        check(replace(VALID, span=Span(5, 8)), tail)


@pytest.mark.parametrize("state", [state for state in NodeState if state is not NodeState.ONLINE])
def test_a_node_that_is_not_online_opens_no_session(state: NodeState) -> None:
    with pytest.raises(Refused, match=f"this node is {state}") as refused:
        check(state=state)
    assert refused.value.code == "draining"


def test_sessions_are_limited_per_host_and_in_all() -> None:
    with pytest.raises(Refused, match=r"10\.0\.0\.1 has 2 sessions open here") as refused:
        check(session_hosts=("10.0.0.1", "10.0.0.1"))
    assert refused.value.code == "full"
    check(session_hosts=("10.0.0.2", "10.0.0.2", "10.0.0.1"))
    with pytest.raises(Refused, match="4 sessions are open") as refused:
        check(session_hosts=("10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"))
    assert refused.value.code == "full"
