"""A node's figures for Prometheus: read when it asks, so that nothing is counted twice."""

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
LOOK_S = 5.0

Values = float | Mapping[tuple[str, ...], float]
"""One number, or one for each combination of labels."""


@dataclass(frozen=True)
class Named:
    """One metric.  Counters get `_total` behind the name where they are shown."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[NodeSnapshot], Values]
    labels: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The name in a scrape and in docs/metrics.md."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    def family(self, figures: NodeSnapshot) -> Metric:
        made = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = made(PREFIX + self.name, self.help, labels=self.labels)
        values = self.read(figures)
        for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
            family.add_metric(labels, value)
        return family


def _by(counts: Mapping[str, int]) -> Values:
    return {(reason,): float(count) for reason, count in counts.items()}


def _info(figures: NodeSnapshot) -> Values:
    numerics = figures.numerics
    if numerics is None:
        return {}
    told = (numerics.weights[:16], numerics.dtype, numerics.quantization, numerics.activations or "native")
    return {(figures.model, figures.node, figures.device, *told, __version__): 1.0}


METRICS = (
    Named("info", "gauge", "What this node serves; always 1", _info,
          ("model", "node", "device", "weights", "dtype", "quantization", "activations", "version")),
    Named("state", "gauge", "1 for the state that the node is in", lambda f: {
        (state.value,): float(state is f.state) for state in NodeState}, ("state",)),
    Named("uptime_seconds", "gauge", "Since the program was started", lambda f: f.uptime_s),
    Named("span_start", "gauge", "First block served", lambda f: f.span.start if f.span else 0),
    Named("span_end", "gauge", "Block after the last one served", lambda f: f.span.end if f.span else 0),
    Named("model_blocks", "gauge", "Blocks of the whole model", lambda f: f.blocks),
    Named("block_rows_per_second", "gauge", "As measured before serving; 0 while nothing is loaded", lambda f: f.rate),
    Named("memory_bytes", "gauge", "Of this process on its device; on a CPU, resident", lambda f: f.memory_bytes),
    Named("moves", "counter", "To other blocks", lambda f: f.moves),
    Named("sessions", "gauge", "Open now", lambda f: f.sessions),
    Named("sessions_opened", "counter", "Sessions granted", lambda f: f.opened),
    Named("sessions_resumed", "counter", "Sessions that went on here after a loss elsewhere", lambda f: f.resumed),
    Named("sessions_refused", "counter", "Sessions not granted", lambda f: _by(f.refusals), ("reason",)),
    Named("streams", "gauge", "Open now, control and link", lambda f: f.streams),
    Named("peers_turned_away", "counter", "Streams ended with an error, and peers with a wrong key",
          lambda f: _by(f.turned_away), ("reason",)),
    Named("frames", "counter", "Appends computed", lambda f: f.counters.frames),
    Named("forwards", "counter", "Batches that the device has run", lambda f: f.counters.forwards),
    Named("forward_sessions", "counter", "Sessions in those batches, summed", lambda f: f.counters.forward_sessions),
    Named("rows", "counter", "Rows computed, in every block served: prompts and tree nodes", lambda f: f.counters.rows),
    Named("tokens", "counter", "Tokens that stayed in the texts: prompts, and what was accepted of trees",
          lambda f: f.counters.tokens),
    Named("skipped_rows", "counter", "Rows that died while they waited, and were not computed",
          lambda f: f.counters.skipped_rows),
    Named("compute_seconds", "counter", "Of the device in forwards", lambda f: f.counters.compute_s),
    Named("queue_length", "gauge", "Appends that wait for the device", lambda f: f.queue),
    Named("queue_seconds", "counter", "What appends waited for the device, summed", lambda f: f.counters.waited_s),
    Named("queue_recent_seconds", "gauge", "What an append waits, smoothed over the last dozens",
          lambda f: f.counters.queue_s),
    Named("kv_pages", "gauge", "KV pages there are", lambda f: f.kv.pages),
    Named("kv_pages_free", "gauge", "KV pages that a new session could have", lambda f: f.kv.free),
    Named("kv_pages_shared", "gauge", "KV pages that several sessions read", lambda f: f.kv.shared),
    Named("kv_tokens", "gauge", "KV rows there are", lambda f: f.kv.tokens),
    Named("kv_tokens_free", "gauge", "KV rows that a new session could have", lambda f: f.kv.free_tokens),
    Named("prefix_hits", "counter", "Sessions that began on kept KV", lambda f: f.kv.prefix_hits),
    Named("prefix_tokens", "counter", "Tokens they found there", lambda f: f.kv.prefix_tokens),
    Named("journal_bytes", "gauge", "Kept or promised for replays", lambda f: f.journal_bytes),
    Named("journal_room_bytes", "gauge", "For all journals", lambda f: f.journal_room),
    Named("sent_bytes", "counter", "Messages sent, without TLS and HTTP/2", lambda f: _by(f.sent), ("kind",)),
    Named("received_bytes", "counter", "Messages received, without TLS and HTTP/2",
          lambda f: _by(f.received), ("kind",)),
    Named("peers", "gauge", "Other nodes whose records are known", lambda f: f.peers),
    Named("records_disbelieved", "counter", "Records of others that were not believed",
          lambda f: _by(f.disbelieved), ("reason",)),
    Named("tenants", "gauge", "Nodes that rent a port here", lambda f: f.tenants),
    Named("guest_connections", "gauge", "On lent ports", lambda f: f.guest_connections),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class NodeCollector:
    """Asks the event loop, from whatever thread Prometheus is answered in."""

    loop: asyncio.AbstractEventLoop
    look: Callable[[], Awaitable[NodeSnapshot]]

    def collect(self) -> Iterable[Metric]:
        async def looked() -> NodeSnapshot:
            return await self.look()

        figures = asyncio.run_coroutine_threadsafe(looked(), self.loop).result(LOOK_S)
        return [metric.family(figures) for metric in METRICS]

    def describe(self) -> Iterable[Metric]:
        """Nothing is looked at on registering."""
        return []


@contextlib.asynccontextmanager
async def metrics_served(listen: str, look: Callable[[], Awaitable[NodeSnapshot]]) -> AsyncIterator[str]:
    """Answer Prometheus at `listen`, `HOST:PORT`, without any password; yields the URL.  Raises BadRequest."""
    wanted = Address.parse(listen)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(NodeCollector(asyncio.get_running_loop(), look))
    try:
        server, thread = start_http_server(wanted.port, wanted.host, registry)
    except OSError as error:
        raise BadRequest(
            f"cannot serve metrics on {wanted.bare} ({error.strerror}): choose another with --metrics HOST:PORT, "
            "port 0 for a free one"
        ) from None
    try:
        yield f"http://{Address(wanted.host, server.server_port).bare}/metrics"
    finally:
        # Elsewhere, so that a scrape under way still gets its figures from the loop.
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)
