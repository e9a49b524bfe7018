"""Every drafter, driver and loss together: the text is stock transformers', or that of the undisturbed run."""

import asyncio
import itertools
from pathlib import Path

import pytest
from tests.support.disturbed_texts import Disturbance, plain_text, write_texts
from tests.support.untrained_head import save_untrained_head

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.prompt_encoder import load_prompt_encoder
from treeswarm_client.reference import stock_greedy

DRAFTS = ("ngram", "demo-draft", "tail", "tail+ngram")
VICTIMS = ("none", "tail", "middle", "driver")
TEMPERATURES = (0.0, 1.0)
COUNT = 36


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return held_out_prompts(load_prompt_encoder("demo", resolve_model("demo")), 2)[1]


@pytest.fixture(scope="module")
def expected(prompt: list[int]) -> dict[float, list[int]]:
    """The text by temperature: stock transformers', and that of undisturbed plain decoding on one node."""
    stock = asyncio.run(stock_greedy(resolve_model("demo"), [prompt], COUNT, "float32"))
    sampled = asyncio.run(plain_text(prompt, COUNT, temperature=1.0, seed=3))
    return {0.0: stock.token_ids[0], 1.0: sampled}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    save_untrained_head(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("by_node", [False, True], ids=["self", "node"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_text_is_the_targets_own(
    draft: str, by_node: bool, prompt: list[int], expected: dict[float, list[int]], head: Path
) -> None:
    """One swarm writes the text again and again; each node that dies in mid-text is replaced by a new one."""
    victims = VICTIMS if by_node else VICTIMS[:-1]  # a client that drives by itself has no driver to lose
    hows = [Disturbance(*case) for case in itertools.product(victims, TEMPERATURES)]
    written = write_texts(draft, prompt, expected, hows, by_node=by_node, head=head)
    for how, text in zip(hows, written, strict=True):
        assert text.token_ids == expected[how.temperature], how
        assert text.recoveries == (how.victim != "none"), how
        assert (text.proposals > 0) == draft.startswith("tail"), how
        if draft != "ngram":  # which may be right nowhere in a text as short as this
            assert text.traversals < COUNT, how
