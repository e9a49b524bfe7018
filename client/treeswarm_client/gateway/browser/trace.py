"""What a stream says of its traversals where the caller asks for it: which tokens came together, the trees, the route.

Every chunk of such a stream has one more field, `treeswarm`, which clients of OpenAI's API ignore.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm.protocol.messages import HopTiming
from treeswarm_client.gateway.answers.token_text import Decode
from treeswarm_client.gateway.browser.watchers import round_as_dict
from treeswarm_client.gateway.events import FinishEvent, GenerationEvent, TokenEvent
from treeswarm_client.generation.route_dict import drivers_as_dict, route_as_dict
from treeswarm_client.generation.run import Run
from treeswarm_client.planner.policy import Round

TraceNote = dict[str, Any]


@dataclass(eq=False)
class AnswerTrace:
    """The trace of one generation, of which the stream sends what is new with each chunk."""

    decode: Decode
    run: Run | None = None
    """The generation, once it is made."""
    _round_count: int = 0
    _place: TraceNote = field(default_factory=dict)
    """Traversal of the last token, and the number of tokens with it."""
    _news: TraceNote = field(default_factory=dict)
    """What was not sent yet."""
    _route: TraceNote | None = None
    """The route as it was last sent."""

    def add_round(self, round_: Round) -> None:
        """Keep a round for the next chunk, with the number of its traversal, which its tokens have as well."""
        self._round_count += 1
        traversal = self.run.recorder.traversals if self.run is not None else 0
        note = {"round": self._round_count, "traversal": traversal, "compute_ms": compute_ms(round_.timings)}
        self._news.setdefault("rounds", []).append(note | round_as_dict(round_, self.decode))

    def add_to(self, chunks: Iterable[dict[str, Any]], event: GenerationEvent) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an event, each with the traversal of its token, the first with all that is new."""
        run = self.run
        match event:
            case TokenEvent(_, token):
                self._place = {"traversal": token.traversal, "tokens": self._place.get("tokens", 0) + 1}
            case FinishEvent() if run is not None and run.stats is not None:
                self._news["stats"] = run.stats.as_dict()
        route = route_of(run) if run is not None else None
        if route is not None and route != self._route:
            self._news["route"] = self._route = route
        for chunk in chunks:
            news, self._news = self._news, {}
            yield chunk | {"treeswarm": self._place | news}


def compute_ms(timings: Sequence[Sequence[HopTiming]]) -> list[float]:
    """Return the milliseconds that each hop computed, given the timings of a traversal per append and hop."""
    hops = max(map(len, timings), default=0)
    return [round(sum(append[i].compute_us for append in timings if i < len(append)) / 1e3, 1) for i in range(hops)]


def route_of(run: Run) -> TraceNote | None:
    """Return the nodes that compute an answer and what failed over, or None as long as no node does."""
    if run.chain is not None:
        return {"driver": None, **route_as_dict(run.chain)}
    if not run.drivers:
        return None
    *_, driver = drivers_as_dict(run)["nodes"]
    return {"driver": driver, "hops": driver["hops"], "repairs": []}
