"""A node's metrics for Prometheus, read when it asks, so that nothing is counted twice."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from treeswarm import __version__
from treeswarm.errors import BadRequest
from treeswarm.protocol.address import Address
from treeswarm.protocol.records import NodeState
from treeswarm_node.monitoring.snapshot import NodeSnapshot

PREFIX = "treeswarm_node_"
# The event loop answers within milliseconds; a node that is shutting down may not answer any more.
READ_S = 5.0

Values = float | Mapping[tuple[str, ...], float]
"""One number, or one number for each combination of labels."""


@dataclass(frozen=True)
class NodeMetric:
    """One metric of a node, and how to read it off a snapshot."""

    name: str
    """Name without prefix and, for counters, without `_total`."""
    kind: Literal["counter", "gauge"]
    help: str
    """Description for Prometheus and for the table in docs/metrics.md."""
    read: Callable[[NodeSnapshot], Values]
    labels: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The name in a scrape and in docs/metrics.md."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    def family(self, snapshot: NodeSnapshot) -> Metric:
        """Return the metric with its values, as the Prometheus client takes it."""
        family_class = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = family_class(PREFIX + self.name, self.help, labels=self.labels)
        values = self.read(snapshot)
        for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
            family.add_metric(labels, value)
        return family


def _by_label(counts: Mapping[str, int]) -> Values:
    return {(label,): float(count) for label, count in counts.items()}


def _info(snapshot: NodeSnapshot) -> Values:
    about, numerics = snapshot.about, snapshot.hosting.numerics
    if numerics is None:
        return {}
    labels = (numerics.weights[:16], numerics.dtype, numerics.quantization, numerics.activations or "native")
    return {(about.model, about.node, about.device, *labels, __version__): 1.0}


def _state(snapshot: NodeSnapshot) -> Values:
    return {(state.value,): float(state is snapshot.hosting.state) for state in NodeState}


def _span_start(snapshot: NodeSnapshot) -> Values:
    return snapshot.hosting.span.start if snapshot.hosting.span else 0


def _span_end(snapshot: NodeSnapshot) -> Values:
    return snapshot.hosting.span.end if snapshot.hosting.span else 0


METRICS = (
    NodeMetric(
        "info",
        "gauge",
        "Always 1; its labels say what this node serves",
        _info,
        ("model", "node", "device", "weights", "dtype", "quantization", "activations", "version"),
    ),
    NodeMetric("state", "gauge", "1 for the state that the node is in, 0 for the others", _state, ("state",)),
    NodeMetric("uptime_seconds", "gauge", "Seconds since the program was started", lambda s: s.uptime_s),
    NodeMetric("span_start", "gauge", "First block hosted", _span_start),
    NodeMetric("span_end", "gauge", "Block after the last one hosted", _span_end),
    NodeMetric("model_blocks", "gauge", "Blocks of the whole model", lambda s: s.about.blocks),
    NodeMetric(
        "block_rows_per_second",
        "gauge",
        "Block-rows per second, as measured before serving; 0 while nothing is loaded",
        lambda s: s.hosting.rate,
    ),
    NodeMetric(
        "memory_bytes",
        "gauge",
        "Bytes that this process uses of its device's memory; on a CPU, resident bytes",
        lambda s: s.compute.memory_bytes,
    ),
    NodeMetric("moves", "counter", "Moves to other blocks", lambda s: s.hosting.moves),
    NodeMetric(
        "speculator",
        "gauge",
        "1 for the state of the speculator: it proposes, or was refused because n-grams guess better; none without one",
        lambda s: {(s.hosting.speculator,): 1.0} if s.hosting.speculator else {},
        labels=("state",),
    ),
    NodeMetric("sessions", "gauge", "Sessions open now", lambda s: s.sessions.open),
    NodeMetric("sessions_opened", "counter", "Sessions opened", lambda s: s.sessions.opened),
    NodeMetric(
        "sessions_resumed",
        "counter",
        "Sessions that continued here after another node was lost",
        lambda s: s.sessions.resumed,
    ),
    NodeMetric(
        "sessions_refused", "counter", "Sessions refused", lambda s: _by_label(s.sessions.refusals), ("reason",)
    ),
    NodeMetric("texts_driven", "counter", "Texts driven for clients", lambda s: s.sessions.driven),
    NodeMetric("streams", "gauge", "Control and link streams open now", lambda s: s.network.streams),
    NodeMetric(
        "peers_turned_away",
        "counter",
        "Streams ended with an error, and peers with a wrong key",
        lambda s: _by_label(s.network.turned_away),
        ("reason",),
    ),
    NodeMetric("frames", "counter", "Appends computed", lambda s: s.compute.counters.frames),
    NodeMetric("forwards", "counter", "Forwards that the device has run", lambda s: s.compute.counters.forwards),
    NodeMetric(
        "forward_sessions",
        "counter",
        "Sessions in each forward, summed over all forwards",
        lambda s: s.compute.counters.forward_sessions,
    ),
    NodeMetric(
        "rows",
        "counter",
        "Rows of prompts and tree nodes that went through all hosted blocks",
        lambda s: s.compute.counters.rows,
    ),
    NodeMetric(
        "tokens",
        "counter",
        "Tokens that became part of a text: those of prompts, and those accepted of trees",
        lambda s: s.compute.counters.tokens,
    ),
    NodeMetric(
        "skipped_rows",
        "counter",
        "Rows that died while they waited, and were not computed",
        lambda s: s.compute.counters.skipped_rows,
    ),
    NodeMetric(
        "compute_seconds",
        "counter",
        "Seconds that the device spent in forwards",
        lambda s: s.compute.counters.compute_s,
    ),
    NodeMetric("queue_length", "gauge", "Appends that wait for the device", lambda s: s.compute.queue),
    NodeMetric(
        "queue_seconds",
        "counter",
        "Seconds that appends waited for the device, summed over all appends",
        lambda s: s.compute.counters.waited_s,
    ),
    NodeMetric(
        "queue_recent_seconds",
        "gauge",
        "Seconds that an append waits for the device, as a moving average over the last dozens",
        lambda s: s.compute.counters.queue_s,
    ),
    NodeMetric("proposals", "counter", "Trees that the speculator proposed", lambda s: s.compute.counters.proposals),
    NodeMetric(
        "proposed_tokens_right",
        "counter",
        "Tokens that the target chose later and the proposal before them had named",
        lambda s: s.compute.counters.proposed_right,
    ),
    NodeMetric("kv_pages", "gauge", "KV pages in all", lambda s: s.kv.pages),
    NodeMetric("kv_pages_free", "gauge", "KV pages that a new session could have", lambda s: s.kv.free),
    NodeMetric("kv_pages_shared", "gauge", "KV pages that several sessions read", lambda s: s.kv.shared),
    NodeMetric("kv_tokens", "gauge", "KV rows in all", lambda s: s.kv.tokens),
    NodeMetric("kv_tokens_free", "gauge", "KV rows that a new session could have", lambda s: s.kv.free_tokens),
    NodeMetric(
        "prefix_hits", "counter", "Sessions that began on pages from the prefix cache", lambda s: s.kv.prefix_hits
    ),
    NodeMetric(
        "prefix_tokens", "counter", "Tokens that those sessions did not compute again", lambda s: s.kv.prefix_tokens
    ),
    NodeMetric(
        "journal_bytes", "gauge", "Bytes kept or reserved for replay logs", lambda s: s.sessions.replay_log_bytes
    ),
    NodeMetric(
        "journal_room_bytes", "gauge", "Bytes available for all replay logs", lambda s: s.sessions.replay_log_limit
    ),
    NodeMetric(
        "sent_bytes",
        "counter",
        "Bytes of messages sent, without TLS and HTTP/2",
        lambda s: _by_label(s.network.sent),
        ("kind",),
    ),
    NodeMetric(
        "received_bytes",
        "counter",
        "Bytes of messages received, without TLS and HTTP/2",
        lambda s: _by_label(s.network.received),
        ("kind",),
    ),
    NodeMetric("peers", "gauge", "Other nodes whose records are known", lambda s: s.network.peers),
    NodeMetric(
        "records_disbelieved",
        "counter",
        "Records of other nodes that were rejected",
        lambda s: _by_label(s.network.disbelieved),
        ("reason",),
    ),
    NodeMetric("tenants", "gauge", "Nodes that borrow a port here", lambda s: s.network.port_borrowers),
    NodeMetric("guest_connections", "gauge", "Connections on lent ports", lambda s: s.network.lent_connections),
)


@dataclass(frozen=True, eq=False)
class NodeCollector:
    """Reads a snapshot in the event loop for whichever thread Prometheus is answered in."""

    loop: asyncio.AbstractEventLoop
    read: Callable[[], Awaitable[NodeSnapshot]]

    def collect(self) -> Iterable[Metric]:
        """Return all metrics as of now."""

        async def read() -> NodeSnapshot:
            return await self.read()

        snapshot = asyncio.run_coroutine_threadsafe(read(), self.loop).result(READ_S)
        return [metric.family(snapshot) for metric in METRICS]

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering the collector reads no snapshot."""
        return []


@contextlib.asynccontextmanager
async def serve_metrics(listen: str, read: Callable[[], Awaitable[NodeSnapshot]]) -> AsyncIterator[str]:
    """Answer Prometheus at `listen`, `HOST:PORT`, without a password; yield the URL.  Raises BadRequest."""
    address = Address.parse(listen)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(NodeCollector(asyncio.get_running_loop(), read))
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        raise BadRequest(
            f"cannot serve metrics on {address.bare} ({error.strerror}): choose another address with "
            "--metrics HOST:PORT, or port 0 for a free port"
        ) from None
    try:
        yield f"http://{Address(address.host, server.server_port).bare}/metrics"
    finally:
        # In a thread, so that a scrape under way still gets its figures from the event loop.
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)
