"""The gateway and the Hugging Face interface let a node drive: the texts are those that they drive themselves."""

import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.request import urlopen

import pytest
import pytest_asyncio
from tests.support.gateway_process import gateway
from transformers import AutoModelForCausalLM, AutoTokenizer

from treeswarm.model_files import resolve_model
from treeswarm_client import AutoSwarmModelForCausalLM
from treeswarm_client.local_swarm import LocalNode, LocalSwarm, local_swarm

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
PROMPT = "class Queue:\n    def __init__(self"
TOKENS = 30


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """A node that drives and counts the texts, and a second one with the other blocks."""
    async with local_swarm("demo", [], emulate_link="delay=2ms") as nodes:
        first = await nodes.start("--blocks", "0:4", "--drive", "--registry", "dht:", "--metrics", "127.0.0.1:0")
        await nodes.start("--blocks", "4:8", "--registry", first.ready["join"])
        yield nodes


def texts_driven(node: LocalNode) -> int:
    with urlopen(node.ready["metrics"]) as answer:
        figures = answer.read().decode()
    found = re.search(r"^treeswarm_node_texts_driven_total (\d+)", figures, re.MULTILINE)
    assert found is not None
    return int(found[1])


async def test_the_gateways_answers_are_driven(swarm: LocalSwarm) -> None:
    driver, options = swarm.nodes[0], {"model": "demo", "prompt": PROMPT, "max_tokens": TOKENS, "seed": 3}
    texts = {}
    for where in ("self", driver.address):
        before = texts_driven(driver)
        serving = gateway(driver.pinned, "--drive", where, named_by="--registry")
        async with serving as served, served.openai() as caller:
            answers = [await caller.completions.create(**options, temperature=t) for t in (0.0, 1.0)]
        texts[where] = [answer.choices[0].text for answer in answers]
        assert texts_driven(driver) - before == (0 if where == "self" else 2)
    assert texts["self"] == texts[driver.address]
    assert all(texts["self"])


async def test_the_hugging_face_interface_is_driven(swarm: LocalSwarm) -> None:
    driver, tokenizer = swarm.nodes[0], AutoTokenizer.from_pretrained(resolve_model("demo"))
    inputs: Any = tokenizer(PROMPT, return_tensors="pt")
    stock: Any = AutoModelForCausalLM.from_pretrained(resolve_model("demo"), dtype="float32")
    expected = stock.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    before = texts_driven(driver)
    with AutoSwarmModelForCausalLM.from_pretrained("demo", registry=driver.pinned, drive=driver.address) as model:
        assert model.generate(**inputs, max_new_tokens=TOKENS).tolist() == expected.tolist()
    assert texts_driven(driver) - before == 1
