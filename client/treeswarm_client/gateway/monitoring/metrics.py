"""The gateway's metrics for Prometheus: counters of its own, and gauges that are read at each scrape."""

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
    """All metrics of one gateway, in a registry of their own so that two gateways in one process stay apart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = _counter(
            self.registry, "requests", "HTTP requests by endpoint and status", "endpoint", "status"
        )
        self.tokens = _counter(self.registry, "tokens", "Tokens: prompt, cached (of the prompt) and completion", "kind")
        self.traversals = _counter(self.registry, "traversals", "Traversals of the chain, prefill included")
        self.failovers = _counter(self.registry, "failovers", "Repairs of a chain during a generation")
        self.rounds = RoundMetrics(self.registry)
        self.first_token_s = _histogram(
            self.registry, "first_token_seconds", "Time from a request's arrival to its first token", SECONDS
        )
        self.inter_token_s = _histogram(
            self.registry, "inter_token_seconds", "Time between two tokens of a choice", SECONDS
        )

    def add_gauges(self, admission: Callable[[], Admission], view: Callable[[], SwarmView | None]) -> None:
        """Read gauges from these two at each scrape."""
        self.registry.register(_Gauges(admission, view))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' exposition format."""
        return bytes(generate_latest(self.registry))

    def observe_runs(self, runs: Sequence[Run], n: int) -> None:
        """Count a request's generations when they have ended, complete or not."""
        usage = count_usage(runs, n)
        for kind, tokens in (("prompt", usage.prompt), ("completion", usage.completion), ("cached", usage.cached)):
            self.tokens.labels(kind).inc(tokens)
        self.traversals.inc(sum(run.recorder.traversals for run in runs))
        self.failovers.inc(sum(len(run.recorder.recoveries) for run in runs))

    def timer(self) -> "TokenTimer":
        """Return a timer for one request, which starts now."""
        return TokenTimer(self)


class RoundMetrics:
    """The metrics of single rounds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tree_nodes = _counter(registry, "tree_nodes", "Draft nodes sent")
        self.tree_hits = _counter(registry, "tree_hits", "Draft nodes that were accepted")
        self.tree_misses = _counter(registry, "tree_misses", "Walks that left the draft tree")
        self.tree_size = _histogram(registry, "tree_size", "Draft nodes of one round", NODES)
        self.committed = _histogram(registry, "tokens_per_traversal", "Tokens committed by one round", TOKENS)
        self.round_s = _histogram(
            registry, "round_seconds", "Time from the first append to the end of the walk", SECONDS
        )
        self.hop_s = _histogram(
            registry, "hop_seconds", "Time of one node in one round, computing or waiting", SECONDS, "part"
        )

    def observe(self, round_: Round) -> None:
        """Count one round."""
        nodes, accepted = len(round_.draft), len(round_.walk.accepted)
        self.tree_size.observe(nodes)
        self.committed.observe(accepted + 1)
        self.round_s.observe(round_.seconds)
        if nodes:
            self.tree_nodes.inc(nodes)
            self.tree_hits.inc(accepted)
            self.tree_misses.inc()
        for hops in round_.timings:
            for hop in hops:
                self.hop_s.labels("compute").observe(hop.compute_us / 1e6)
                self.hop_s.labels("queue").observe(hop.queue_us / 1e6)


@dataclass(eq=False)
class TokenTimer:
    """Times the tokens of one request."""

    metrics: GatewayMetrics
    _start: float = field(default_factory=time.perf_counter)
    _last: dict[int, float] = field(default_factory=dict)
    """Time of each choice's latest token."""

    def observe(self, event: GenerationEvent) -> None:
        """Time an event if it is a token."""
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
        yield _gauge("generations", "Generations that run now", admission.running)
        yield _gauge("waiting", "Requests that wait for their turn", admission.waiting)
        serving = view.serving() if view is not None else ()
        missing = missing_blocks([record.span for record in serving], view.target.blocks) if view is not None else ()
        yield _gauge("ready", "1 if every block is served", view is not None and not missing)
        yield _gauge("nodes", "Nodes online of the numerics class in use", len(serving))
        yield _gauge("missing_blocks", "Blocks that no node serves", sum(len(span) for span in missing))
        yield _gauge("kv_free_tokens", "KV cache room that nodes announce", sum(r.free_tokens for r in serving))
        banned = view.failures.banned(asyncio.get_running_loop().time()) if view is not None else ()
        yield _gauge("bans", "Nodes avoided now because they failed", len(banned))


def _counter(registry: CollectorRegistry, name: str, help: str, *labels: str) -> Counter:
    return Counter(f"{PREFIX}_{name}", help, labels, registry=registry)


def _histogram(registry: CollectorRegistry, name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
    return Histogram(f"{PREFIX}_{name}", help, labels, buckets=buckets, registry=registry)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", help, value=float(value))
