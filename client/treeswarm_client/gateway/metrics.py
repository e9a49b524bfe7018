"""What a gateway tells Prometheus: counters of its own, and gauges read when somebody asks."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from treeswarm.protocol.spans import missing_blocks
from treeswarm_client.discovery.swarm_view import SwarmView
from treeswarm_client.gateway.admission import Admission
from treeswarm_client.gateway.events import GenerationEvent, TokenEvent, count_usage
from treeswarm_client.generation.run import Run
from treeswarm_client.planner.policy import Round

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
NODES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PREFIX = "treeswarm_gateway"


class GatewayMetrics:
    """All of them in a registry of its own: two gateways in one process do not meet."""

    def __init__(self) -> None:
        self.registry = made = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", help, labels, registry=made)

        def histogram(name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", help, labels, buckets=buckets, registry=made)

        self.requests = counter("requests", "HTTP requests by endpoint and status", "endpoint", "status")
        self.tokens = counter("tokens", "Tokens: prompt, cached (of the prompt) and completion", "kind")
        self.traversals = counter("traversals", "Round trips through the chain, prefill included")
        self.tree_nodes = counter("tree_nodes", "Drafted nodes sent")
        self.tree_hits = counter("tree_hits", "Drafted nodes that were the target's own choice")
        self.tree_misses = counter("tree_misses", "Walks that left a tree")
        self.failovers = counter("failovers", "Times a chain was mended under a generation")
        self.tree_size = histogram("tree_size", "Drafted nodes of one round", NODES)
        self.committed = histogram("tokens_per_traversal", "Tokens committed by one round", TOKENS)
        self.round_s = histogram("round_seconds", "From the first append to the end of the walk", SECONDS)
        self.hop_s = histogram("hop_seconds", "Of one node in one round: computing, waiting", SECONDS, "part")
        self.first_token_s = histogram("first_token_seconds", "From a request's arrival", SECONDS)
        self.inter_token_s = histogram("inter_token_seconds", "Between two tokens of a choice", SECONDS)

    def follow(self, admission: Callable[[], Admission], view: Callable[[], SwarmView | None]) -> None:
        """Read gauges from these whenever somebody asks."""
        self.registry.register(_Gauges(admission, view))

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        return bytes(generate_latest(self.registry))

    def observe_round(self, flown: Round) -> None:
        hits = len(flown.found.accepted)
        self.tree_size.observe(len(flown.draft))
        self.committed.observe(hits + 1)
        self.round_s.observe(flown.seconds)
        if len(flown.draft):
            self.tree_nodes.inc(len(flown.draft))
            self.tree_hits.inc(hits)
            self.tree_misses.inc()
        for hops in flown.timings:
            for hop in hops:
                self.hop_s.labels("compute").observe(hop.compute_us / 1e6)
                self.hop_s.labels("queue").observe(hop.queue_us / 1e6)

    def observe_runs(self, runs: Sequence[Run], n: int) -> None:
        """When a request's generations have ended, whole or not."""
        usage = count_usage(runs, n)
        for kind, tokens in (("prompt", usage.prompt), ("completion", usage.completion), ("cached", usage.cached)):
            self.tokens.labels(kind).inc(tokens)
        self.traversals.inc(sum(run.meter.traversals for run in runs))
        self.failovers.inc(sum(len(run.meter.recoveries) for run in runs))

    def timer(self) -> "TokenTimer":
        return TokenTimer(self)


@dataclass(eq=False)
class TokenTimer:
    """Times one request's tokens."""

    metrics: GatewayMetrics
    _start: float = field(default_factory=time.perf_counter)
    _last: dict[int, float] = field(default_factory=dict)

    def saw(self, event: GenerationEvent) -> None:
        if not isinstance(event, TokenEvent):
            return
        now, before = time.perf_counter(), self._last.get(event.choice)
        self._last[event.choice] = now
        if before is not None:
            self.metrics.inter_token_s.observe(now - before)
        elif len(self._last) == 1:
            self.metrics.first_token_s.observe(now - self._start)


@dataclass(frozen=True)
class _Gauges(Collector):
    admission: Callable[[], Admission]
    view: Callable[[], SwarmView | None]

    def collect(self) -> Iterator[Metric]:
        admission, view = self.admission(), self.view()
        yield _gauge("generations", "Running now", admission.running)
        yield _gauge("waiting", "Requests that wait for their turn", admission.waiting)
        serving = view.serving() if view is not None else ()
        missing = missing_blocks([record.span for record in serving], view.target.blocks) if view is not None else ()
        yield _gauge("ready", "1: every block is served by somebody", view is not None and not missing)
        yield _gauge("nodes", "Online, of the class of weights that is asked", len(serving))
        yield _gauge("missing_blocks", "Blocks that nobody serves", sum(len(span) for span in missing))
        yield _gauge("kv_free_tokens", "Room that nodes say they have", sum(r.free_tokens for r in serving))
        banned = view.bans.banned(asyncio.get_running_loop().time()) if view is not None else ()
        yield _gauge("bans", "Nodes avoided now because they failed", len(banned))


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", help, value=float(value))
