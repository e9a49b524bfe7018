"""A node's metrics as Prometheus reads them, and the table of them in the docs."""

import asyncio
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from treeswarm.errors import BadRequest
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm_node.engine.counters import Counters
from treeswarm_node.monitoring.prometheus import METRICS, serve_metrics
from treeswarm_node.monitoring.snapshot import (
    ComputeSnapshot,
    KVSnapshot,
    NetworkSnapshot,
    NodeDescription,
    NodeSnapshot,
    SessionsSnapshot,
    SpanSnapshot,
)

SNAPSHOT = NodeSnapshot(
    about=NodeDescription("demo", "abc", "cpu", "127.0.0.1:4001", blocks=8),
    hosting=SpanSnapshot(NodeState.ONLINE, Span(2, 5), NumericsClass("ab" * 32, "float32"), speculator="refused"),
    uptime_s=12.5,
    compute=ComputeSnapshot(Counters(rows=70, tokens=30, compute_s=1.5, waited_s=0.25)),
    sessions=SessionsSnapshot(open=3, refusals={"full": 2, "mismatch": 1}),
    kv=KVSnapshot(pages=10, free=4),
    network=NetworkSnapshot(sent={"link": 1000, "control": 20}),
)


def scrape(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(url, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def labelled(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


async def test_prometheus_reads_the_nodes_figures() -> None:
    snapshots = [SNAPSHOT]

    async def read() -> NodeSnapshot:
        return snapshots[0]

    async with serve_metrics("127.0.0.1:0", read) as url:
        values = await asyncio.to_thread(scrape, url)
        assert values["treeswarm_node_sessions", labelled()] == 3
        assert values["treeswarm_node_span_end", labelled()] == 5
        assert values["treeswarm_node_state", labelled(state="online")] == 1
        assert values["treeswarm_node_state", labelled(state="paused")] == 0
        assert values["treeswarm_node_sessions_refused_total", labelled(reason="full")] == 2
        assert values["treeswarm_node_speculator", labelled(state="refused")] == 1
        assert values["treeswarm_node_rows_total", labelled()] == 70
        assert values["treeswarm_node_queue_seconds_total", labelled()] == 0.25
        assert values["treeswarm_node_kv_tokens_free", labelled()] == 256
        assert values["treeswarm_node_sent_bytes_total", labelled(kind="link")] == 1000
        assert any(name == "treeswarm_node_info" and ("weights", "ab" * 8) in labels for name, labels in values)
        assert any(name == "process_resident_memory_bytes" for name, _ in values)
        snapshots[0] = NodeSnapshot(SNAPSHOT.about, SpanSnapshot(NodeState.PAUSED), 13.0)
        values = await asyncio.to_thread(scrape, url)
        assert values["treeswarm_node_state", labelled(state="paused")] == 1
        assert not any(name == "treeswarm_node_info" for name, _ in values)
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(scrape, url)


async def test_error_for_a_port_in_use_names_the_flag() -> None:
    async def read() -> NodeSnapshot:
        return SNAPSHOT

    async with serve_metrics("127.0.0.1:0", read) as url:
        taken = url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(BadRequest, match="--metrics HOST:PORT"):
            async with serve_metrics(taken, read):
                pass


def test_docs_table_lists_every_metric() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text("utf-8")
    rows = re.findall(r"^\| `(treeswarm_node_\w+)` \| (\w+) \| (.+?) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(m.shown, m.kind, ", ".join(m.labels) or "–", m.help) for m in METRICS]
