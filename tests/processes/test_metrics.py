"""Metrics of real nodes agree with what a client had them compute."""

import asyncio
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from treeswarm.protocol.spans import Span
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import local_swarm

PROMPT = "def read(self, size=-1):\n"
TOKENS = 64


async def scrape(url: str) -> dict[str, float]:
    """Return the values of a scrape by name, summed over labels."""

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as response:
            return str(response.read(), "utf-8")

    values: dict[str, float] = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


async def test_two_nodes_count_the_work_of_a_client() -> None:
    spans = [Span(0, 4), Span(4, 8)]
    async with local_swarm("demo", spans, flags=("--metrics", "127.0.0.1:0")) as swarm:
        urls = [node.ready["metrics"] for node in swarm.nodes]
        before = [await scrape(url) for url in urls]
        async with SwarmClient(model="demo", peers=swarm.peers, draft="demo-draft", tree_size=16) as client:
            run = await client.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
        after = [await scrape(url) for url in urls]
    kept = len(run.prompt_ids) + len(run.token_ids)
    for span, old, new in zip(spans, before, after, strict=True):
        assert (new["treeswarm_node_span_start"], new["treeswarm_node_span_end"]) == (span.start, span.end)
        assert old["treeswarm_node_rows_total"] == 0
        assert new["treeswarm_node_sessions_opened_total"] >= 1
        # The tokens of the last rounds are never committed, since the text has ended.
        assert kept - 34 <= new["treeswarm_node_tokens_total"] <= kept
        assert new["treeswarm_node_rows_total"] >= new["treeswarm_node_tokens_total"]
        assert new["treeswarm_node_compute_seconds_total"] > 0
        assert new["treeswarm_node_kv_pages_free"] <= new["treeswarm_node_kv_pages"]
    head, tail = after
    assert head["treeswarm_node_sent_bytes_total"] > 100_000, "the head sends activations"
    assert tail["treeswarm_node_received_bytes_total"] > 100_000
    assert tail["treeswarm_node_sent_bytes_total"] < 100_000, "the tail sends tokens"
