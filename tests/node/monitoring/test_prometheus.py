"""A node's figures as Prometheus reads them, and the table of them."""

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
from treeswarm_node.monitoring.prometheus import METRICS, metrics_served
from treeswarm_node.monitoring.snapshot import KVSnapshot, NodeSnapshot

FIGURES = NodeSnapshot(
    model="demo",
    node="abc",
    device="cpu",
    address="127.0.0.1:4001",
    state=NodeState.ONLINE,
    uptime_s=12.5,
    blocks=8,
    span=Span(2, 5),
    numerics=NumericsClass("ab" * 32, "float32"),
    sessions=3,
    refusals={"full": 2, "mismatch": 1},
    counters=Counters(rows=70, tokens=30, compute_s=1.5, waited_s=0.25),
    kv=KVSnapshot(pages=10, free=4),
    sent={"link": 1000, "control": 20},
)


def scrape(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def of(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


async def test_prometheus_reads_what_the_node_says() -> None:
    figures = [FIGURES]

    async def look() -> NodeSnapshot:
        return figures[0]

    async with metrics_served("127.0.0.1:0", look) as url:
        read = await asyncio.to_thread(scrape, url)
        assert read["treeswarm_node_sessions", of()] == 3
        assert read["treeswarm_node_span_end", of()] == 5
        assert read["treeswarm_node_state", of(state="online")] == 1
        assert read["treeswarm_node_state", of(state="paused")] == 0
        assert read["treeswarm_node_sessions_refused_total", of(reason="full")] == 2
        assert read["treeswarm_node_rows_total", of()] == 70
        assert read["treeswarm_node_queue_seconds_total", of()] == 0.25
        assert read["treeswarm_node_kv_tokens_free", of()] == 256
        assert read["treeswarm_node_sent_bytes_total", of(kind="link")] == 1000
        assert any(name == "treeswarm_node_info" and ("weights", "ab" * 8) in labels for name, labels in read)
        assert any(name == "process_resident_memory_bytes" for name, _ in read)
        figures[0] = NodeSnapshot("demo", "abc", "cpu", "127.0.0.1:4001", NodeState.PAUSED, 13.0, 8)
        read = await asyncio.to_thread(scrape, url)
        assert read["treeswarm_node_state", of(state="paused")] == 1
        assert not any(name == "treeswarm_node_info" for name, _ in read)
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(scrape, url)


async def test_a_port_in_use_is_told_with_the_flag() -> None:
    async def look() -> NodeSnapshot:
        return FIGURES

    async with metrics_served("127.0.0.1:0", look) as url:
        taken = url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(BadRequest, match="--metrics HOST:PORT"):
            async with metrics_served(taken, look):
                pass


def test_the_table_names_what_the_code_does() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text("utf-8")
    rows = re.findall(r"^\| `(treeswarm_node_\w+)` \| (\w+) \| (.+?) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(m.shown, m.kind, ", ".join(m.labels) or "–", m.help) for m in METRICS]
