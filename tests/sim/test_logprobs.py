"""Log-probabilities are the model's own at every temperature and under every rule, for the prompt's tokens too."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.sim.test_recovery import slow_links
from tests.support.driven_swarm import DrivenSwarm, finish
from tests.support.toy_swarm import SPANS, VOCAB, context_logits, toy_swarm

from treeswarm.errors import BadRequest
from treeswarm.protocol.text_rules import TextRules
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.generation import runner
from treeswarm_client.generation.run import Run
from treeswarm_client.generation.token_logprobs import LogprobWishes, TopLogprobs

PROMPT = [1, 2, 4, 2, 1, 0, 0, 3, 1, 2, 2, 4, 1, 3, 0, 2, 1, 1, 4, 0, 2, 3]
COUNT = 25


def own_logprobs(context: Sequence[int]) -> torch.Tensor:
    return torch.log_softmax(context_logits(context), -1)


def check_top(top: TopLogprobs, context: Sequence[int], count: int) -> None:
    expected = own_logprobs(context)
    assert [token for token, _ in top] == expected.argsort(descending=True, stable=True)[:count].tolist()
    assert [logprob for _, logprob in top] == pytest.approx([float(expected[token]) for token, _ in top], abs=1e-5)


def check_run(run: Run, wishes: LogprobWishes) -> None:
    """Check every log-probability of a run."""
    for i, (token, logprob, top) in enumerate(zip(run.token_ids, run.logprobs, run.top_logprobs, strict=True)):
        context = [*run.prompt_ids, *run.token_ids[:i]]
        assert logprob == pytest.approx(float(own_logprobs(context)[token]), abs=1e-5)
        check_top(top, context, wishes.top)
    if wishes.prompt is None:
        assert run.prompt_logprobs is None
        return
    assert run.prompt_logprobs is not None
    assert run.prompt_logprobs[0] is None
    assert len(run.prompt_logprobs) == len(run.prompt_ids)
    for i, score in enumerate(run.prompt_logprobs[1:], 1):
        assert score is not None
        assert score.id == run.prompt_ids[i]
        assert score.logprob == pytest.approx(float(own_logprobs(run.prompt_ids[:i])[score.id]), abs=1e-5)
        check_top(score.top, run.prompt_ids[:i], wishes.prompt)


def generate(
    wishes: LogprobWishes, *, kill_tail_after_s: float | None = None, count: int = COUNT, **options: Any
) -> Run:
    async def test() -> Run:
        network = MemoryNetwork()
        slow_links(network)
        async with toy_swarm(network, spans=[*SPANS, *SPANS]) as toys:
            client = DrivenSwarm(toys).client("self", draft="ngram")
            run = client.stream(PROMPT, max_new_tokens=count, wishes=wishes, **options)
            finishing = asyncio.create_task(finish(run))
            if kill_tail_after_s is not None:
                await asyncio.sleep(kill_tail_after_s)
                assert run.chain is not None
                await toys.kill(run.chain.hops[-1].address)
            await finishing
            if kill_tail_after_s is not None:
                assert run.chain is not None
                assert run.chain.repairs
            return run

    return run_virtually(test())


@pytest.mark.parametrize("temperature", [0.0, 1.4])
@pytest.mark.parametrize("tree_size", [0, 5])
def test_tokens_come_with_the_models_own_logprobs(temperature: float, tree_size: int) -> None:
    wishes, rules = LogprobWishes(3), TextRules(frequency_penalty=0.3, min_p=0.2)
    run = generate(wishes, temperature=temperature, tree_size=tree_size, rules=rules)
    assert len(run.token_ids) == COUNT
    check_run(run, wishes)


@pytest.mark.parametrize("delay_s", [None, 0.06, 0.1, 0.5])
def test_a_prompt_is_scored_whatever_happens_to_the_tail(
    delay_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of the prompt is scored once, also if the tail dies between two of them."""
    monkeypatch.setattr(runner, "MOST_SCORED_ROWS", 4)
    wishes = LogprobWishes(2, 4)
    check_run(generate(wishes, kill_tail_after_s=delay_s, tree_size=0), wishes)


def test_a_prompt_is_scored_without_generating() -> None:
    wishes = LogprobWishes(0, 0)
    run = generate(wishes, count=0, tree_size=0)
    check_run(run, wishes)
    assert (run.token_ids, run.finish_reason, run.text) == ([], "length", "")


@pytest.mark.parametrize(("top", "prompt"), [(21, None), (-1, None), (0, 21)])
def test_more_than_twenty_logprobs_are_refused(top: int, prompt: int | None) -> None:
    with pytest.raises(BadRequest, match=r"_logprobs is -?\d+: give 0 to 20"):
        LogprobWishes(top, prompt)


def test_a_driver_is_not_asked_for_logprobs() -> None:
    async def test() -> None:
        async with toy_swarm(MemoryNetwork(), spans=[*SPANS, *SPANS]) as toys:
            swarm = DrivenSwarm(toys)
            head = next(address for address, span in toys.spans.items() if span.start == 0)
            swarm.offer(head)
            client, wishes = swarm.client(head, draft="ngram"), LogprobWishes(VOCAB)
            run = client.stream(PROMPT, max_new_tokens=5, tree_size=0, wishes=wishes)
            await finish(run)
            assert not run.drivers
            assert run.drive_why == "the log-probabilities of other tokens are asked for"
            check_run(run, wishes)

    run_virtually(test())
