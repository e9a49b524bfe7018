"""Real nodes compress rows on links: the text is the same in fewer bytes, and mixed settings work together."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from treeswarm.protocol.spans import Span
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalNode, local_swarm

PROMPT = "def read(self, size=-1):\n    " * 8
TOKENS = 32
OWN_FLAGS = [("--compression", "lossless"), ("--compression", "none"), ()]


def sent_on_links(node: LocalNode) -> float:
    """Return the number of bytes that a node sent on links."""
    with urllib.request.urlopen(node.ready["metrics"], timeout=10) as response:
        families = text_string_to_metric_families(str(response.read(), "utf-8"))
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "treeswarm_node_sent_bytes_total" and sample.labels["kind"] == "link"
    )


async def test_compressed_links_give_the_same_text_in_fewer_bytes() -> None:
    spans = [Span(0, 4), Span(0, 4), Span(4, 8)]
    flags = ("--metrics", "127.0.0.1:0")
    async with local_swarm("demo", spans, dtype="bfloat16", flags=flags, own_flags=OWN_FLAGS) as swarm:
        compressing, plain, tail = swarm.nodes
        texts = []
        for head in (compressing, plain):
            # Without trees, so that batches have one shape and 16 bits one text.
            async with SwarmClient(model="demo", peers=f"{head.address},{tail.address}", tree_size=0) as client:
                run = await client.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
                texts.append(run.token_ids)
        compressed_bytes, plain_bytes = sent_on_links(compressing), sent_on_links(plain)
    assert texts[0] == texts[1]
    assert len(texts[0]) == TOKENS
    assert 0 < compressed_bytes < plain_bytes
