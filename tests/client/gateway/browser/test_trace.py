"""A stream says of each token which traversal brought it, of each round its tree, and of the answer its route."""

from collections.abc import AsyncGenerator
from typing import Any, cast

from tests.support.rounds import decode, make_round

from treeswarm.protocol.drive_messages import DrivenHop
from treeswarm.protocol.messages import HopTiming
from treeswarm.protocol.spans import Span
from treeswarm_client.chain.chain import Chain
from treeswarm_client.chain.repair import Repair
from treeswarm_client.discovery.route import Hop
from treeswarm_client.gateway.browser.trace import AnswerTrace, compute_ms, route_of
from treeswarm_client.gateway.events import FinishEvent, TokenEvent
from treeswarm_client.generation.run import DriverUse, Run, Token
from treeswarm_client.generation.stats import TraversalTime

HEAD = Hop("head", "10.0.0.1:4001#pin", Span(0, 2))
TAIL, HEIR = Hop("tail", "10.0.0.2:4001", Span(2, 4)), Hop("heir", "10.0.0.3:4001", Span(2, 4))
HEAD_NOTE = {"node": "head", "address": "10.0.0.1:4001", "blocks": "0:2"}
TAIL_NOTE = {"node": "tail", "address": "10.0.0.2:4001", "blocks": "2:4"}
HEIR_NOTE = {"node": "heir", "address": "10.0.0.3:4001", "blocks": "2:4"}


class _Route:
    """What a trace reads of a chain."""

    def __init__(self, *hops: Hop) -> None:
        self.hops = hops
        self.repairs: list[Repair] = []


async def _no_tokens() -> AsyncGenerator[Token, None]:
    return
    yield


def make_run(route: _Route | None) -> Run:
    return Run(_no_tokens(), [1], chain=cast(Chain, route))


def take(trace: AnswerTrace, traversal: int, chunks: int = 1) -> list[dict[str, Any]]:
    """Return what the chunks of one more token say."""
    sent = trace.add_to([{"id": i} for i in range(chunks)], TokenEvent(0, Token(7, " w7", 0.0, traversal)))
    return [chunk["treeswarm"] for chunk in sent]


def test_tokens_carry_their_traversal_and_their_number() -> None:
    trace = AnswerTrace(decode, make_run(None))
    assert [take(trace, traversal) for traversal in (1, 2, 2)] == [
        [{"traversal": 1, "tokens": 1}],
        [{"traversal": 2, "tokens": 2}],
        [{"traversal": 2, "tokens": 3}],
    ]


def test_round_is_sent_once_with_its_traversal_and_words() -> None:
    run = make_run(None)
    trace = AnswerTrace(decode, run)
    run.recorder.traversal_times += [TraversalTime(0.1, 0.05, 3), TraversalTime(0.1, 0.05, 3)]
    trace.add_round(make_round([-1, 0], accepted=(0,)))
    (note,) = take(trace, 2)
    (round_,) = note["rounds"]
    assert (round_["round"], round_["traversal"]) == (1, 2)
    assert (round_["words"], round_["accepted"], round_["bonus"]) == ([" w0", " w1"], [0], " w99")
    assert "rounds" not in take(trace, 2)[0]


def test_news_wait_for_a_chunk() -> None:
    """A parser of tool calls may hold a token's text back: what is new of it then comes with the next chunk."""
    trace = AnswerTrace(decode, make_run(_Route(HEAD, TAIL)))
    trace.add_round(make_round([-1]))
    assert take(trace, 1, chunks=0) == []
    first, second = take(trace, 2, chunks=2)
    assert (len(first["rounds"]), first["tokens"], first["route"]["hops"]) == (1, 2, [HEAD_NOTE, TAIL_NOTE])
    assert second == {"traversal": 2, "tokens": 2}


def test_route_is_sent_when_it_changes() -> None:
    route = _Route(HEAD, TAIL)
    trace = AnswerTrace(decode, make_run(route))
    assert take(trace, 1)[0]["route"] == {"driver": None, "hops": [HEAD_NOTE, TAIL_NOTE], "repairs": []}
    assert "route" not in take(trace, 2)[0]
    route.hops = (HEAD, HEIR)
    route.repairs.append(Repair(2, ((TAIL, "the connection broke"),), (HEIR,), 0.0841))
    changed = take(trace, 3)[0]["route"]
    assert changed["hops"] == [HEAD_NOTE, HEIR_NOTE]
    (repair,) = changed["repairs"]
    assert (repair["lost"], repair["gained"]) == ([TAIL_NOTE | {"why": "the connection broke"}], [HEIR_NOTE])
    assert repair["seconds"] == 0.0841


def test_driver_is_named_with_its_hops() -> None:
    run = make_run(None)
    assert route_of(run) is None
    run.drivers.append(DriverUse("tail", "10.0.0.2:4001", "as asked for"))
    run.drivers[0].hops = (DrivenHop("head", "10.0.0.1:4001", Span(0, 2)),)
    route = route_of(run)
    assert route is not None
    assert (route["driver"]["address"], route["driver"]["why"]) == ("10.0.0.2:4001", "as asked for")
    assert (route["hops"], route["repairs"]) == ([HEAD_NOTE], [])


def test_end_carries_where_the_time_went() -> None:
    run = make_run(None)
    trace = AnswerTrace(decode, run)
    run.stats = run.recorder.summary(2.0)
    (chunk,) = trace.add_to([{}], FinishEvent(0, "stop"))
    assert chunk["treeswarm"]["stats"]["time"]["wire"] == 2.0


def test_compute_is_summed_over_appends_per_hop() -> None:
    def timing(compute_us: int) -> HopTiming:
        return HopTiming(queue_us=5, compute_us=compute_us, rows=1, batch_sessions=1)

    assert compute_ms([[timing(1000), timing(2000)], [timing(500)]]) == [1.5, 2.0]
    assert compute_ms([]) == []
