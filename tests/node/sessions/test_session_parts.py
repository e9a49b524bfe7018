"""The parts of a session decide when it expires, when its downstream link stays, and how errors are reported."""

from dataclasses import replace
from typing import Any, cast

import pytest

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, Malformed, Refused, SwarmError
from treeswarm.protocol.messages import FaultCode, NextHop, NumericsClass, Open, Resume, Resumption
from treeswarm.protocol.spans import Span
from treeswarm.transport.seam import Stream
from treeswarm_node.sessions.downstream import Downstream
from treeswarm_node.sessions.session_parts import SessionClient, SessionEpoch, fault_code

NEXT_HOP = NextHop("127.0.0.1:9", b"t" * 16)
OPEN = Open(PROTOCOL_VERSION, b"s" * 16, 0, Span(0, 4), NumericsClass("w", "float32"), 512, 64, b"t" * 16, NEXT_HOP)
RESUME = Resume(PROTOCOL_VERSION, b"s" * 16, 1, Resumption(8, 9), b"t" * 16, NEXT_HOP, replays=False)


def epoch(request: Open | Resume = OPEN, **changes: Any) -> SessionEpoch:
    return SessionEpoch(request, cast(Downstream, None), **changes)


def test_the_downstream_link_stays_with_the_next_hop() -> None:
    assert epoch().keeps_downstream(RESUME)
    assert not epoch().keeps_downstream(replace(RESUME, next_hop=NextHop("127.0.0.1:8", b"t" * 16)))
    assert not epoch().keeps_downstream(replace(RESUME, replays=True))
    assert not epoch(link_broken=True).keeps_downstream(RESUME)


def test_a_tail_makes_a_new_downstream_in_every_epoch() -> None:
    assert not epoch(replace(OPEN, next_hop=None)).keeps_downstream(replace(RESUME, next_hop=None))


def test_only_an_opened_epoch_forwards_and_only_a_resumed_one_replays() -> None:
    opened, resumed = epoch(replace(OPEN, forwards_replay=True)), epoch(replace(RESUME, replays=True))
    assert (opened.forwards_replay, opened.replays) == (True, False)
    assert (resumed.forwards_replay, resumed.replays) == (False, True)


@pytest.mark.parametrize(
    ("detached_at", "now", "expired"),
    [(None, 600.0, False), (None, 601.0, True), (500.0, 530.0, False), (500.0, 531.0, True)],
)
def test_a_client_expires_when_idle_or_detached(detached_at: float | None, now: float, expired: bool) -> None:
    client = SessionClient(cast(Stream, None), last_request_at=0.0, detached_at=detached_at)
    assert client.has_expired(now, grace_period_s=30.0, idle_s=600.0) is expired


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refused("full", FaultCode.FULL), FaultCode.FULL),
        (Malformed("garbled"), FaultCode.MALFORMED),
        (LinkBroken("gone"), FaultCode.DOWNSTREAM),
        (SwarmError("other"), FaultCode.INTERNAL),
    ],
)
def test_an_error_is_reported_under_its_code(error: SwarmError, code: FaultCode) -> None:
    assert fault_code(error) is code
