"""Multiple-choice questions are scored through the gateway as stock transformers scores them."""

import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
import torch
from openai import AsyncOpenAI
from tests.support.gateway_process import gateway
from transformers import AutoModelForCausalLM, AutoTokenizer

from treeswarm.model_files import resolve_model
from treeswarm_client.local_swarm import even_cuts, local_swarm

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
QUESTIONS = (
    ("import os\nimport sys\n\ndef read(path):\n    with open(", ("path", "self", "lambda")),
    ("class Queue:\n    def __init__(self", ("):\n", ", size", ".x = 1")),
    ("for i in range(", ("10):", "len(x)):", "é🎉")),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api() -> AsyncIterator[AsyncOpenAI]:
    async with (
        local_swarm("demo", even_cuts(8, 3)) as swarm,
        gateway(swarm.peers, "--draft", "ngram") as served,
        served.openai() as api,
    ):
        yield api


def stock_score(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Return the log-likelihood of a continuation, and whether it is what greedy decoding gives."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].float().log_softmax(-1)
    places = range(len(context) - 1, ids.shape[1] - 1)
    values = [float(logprobs[at, ids[0, at + 1]]) for at in places]
    return math.fsum(values), all(int(logprobs[at].argmax()) == int(ids[0, at + 1]) for at in places)


def read_score(choice: Any, context: int) -> tuple[float, bool]:
    """Return the same of a completion with echo, as lm-eval 0.4.13 reads it."""
    values = choice.logprobs.token_logprobs[context:-1]
    tops = choice.logprobs.top_logprobs[context:-1]
    return math.fsum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


async def test_questions_are_scored_as_by_stock_transformers(api: AsyncOpenAI) -> None:
    folder = resolve_model("demo")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for question, answers in QUESTIONS:
        context = tokenizer(question)["input_ids"]
        for answer in answers:
            continuation = tokenizer(answer, add_special_tokens=False)["input_ids"]
            completion = await api.completions.create(
                model="demo", prompt=[*context, *continuation], echo=True, max_tokens=1, logprobs=1, temperature=0
            )
            expected, expected_greedy = stock_score(model, context, continuation)
            score, greedy = read_score(completion.choices[0], len(context))
            assert score == pytest.approx(expected, abs=1e-3)
            assert greedy == expected_greedy
