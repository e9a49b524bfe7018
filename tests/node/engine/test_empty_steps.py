"""A step may have no rows to compute: all of them died while it waited, or it only commits."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.node.conftest import ADAPTERS, SpanChain, append_of, tiny_model
from transformers import PreTrainedModel

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.base import Attention
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.engine.model_runner import ModelRunner
from treeswarm_node.engine.sampler import Sampler

CutModel = Callable[[PreTrainedModel], SpanChain]
PROMPT = [5, 6, 7]


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> Attention:
    """Run every test of this file with every adapter."""
    return ADAPTERS[request.param]()


def prefill_and_fork(chain: SpanChain, *names: str) -> None:
    """Send a prompt, and a tree: nodes 4 and 5 below its last token (3), and 6 below 5."""
    for name in names:
        chain.open(name, trunk_room=40)
    chain.run({name: append_of(0, 1, [0, 1, 2], PROMPT, prefill=True) for name in names})
    chain.run({name: append_of(1, 4, [3, 3, 5], [8, 9, 10]) for name in names})


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("commit", [[], [5]])
def test_empty_step_does_not_affect_other_sessions(
    family: str, prefill: bool, commit: list[int], cut_in_three: CutModel
) -> None:
    model = tiny_model(family)
    chain = cut_in_three(model)
    prefill_and_fork(chain, "empty", "other")
    empty = append_of(2, 7, [], [], commit=commit, prefill=prefill)
    logits = chain.run({"empty": empty, "other": append_of(2, 7, [6], [11])})
    assert logits["empty"].shape[0] == 0
    expected = model(torch.tensor([[*PROMPT, 9, 10, 11]]), use_cache=False).logits[0, -1]
    assert float((expected - logits["other"][0]).abs().max()) < 1e-4
    if not prefill:
        after = chain.run({"empty": append_of(3, 7, [6], [11])})
        assert float((expected - after["empty"][0]).abs().max()) < 1e-4


def test_empty_step_may_be_alone_in_a_forward(cut_in_three: CutModel) -> None:
    chain = cut_in_three(tiny_model("llama"))
    prefill_and_fork(chain, "one")
    assert chain.run({"one": append_of(2, 7, [], [])})["one"].shape[0] == 0


def test_sampler_returns_nothing_for_no_rows() -> None:
    tokens, logprobs = Sampler(199).choose(torch.empty(0, 199), np.empty(0, np.int64), SamplingSettings(1.0, 5, 0.5))
    assert (len(tokens), len(logprobs)) == (0, 0)


def test_nan_activations_end_only_their_own_session(cut_in_three: CutModel) -> None:
    """Later steps of that session fail too, in the same forward or a later one, because its rows were not computed."""
    middle = cut_in_three(tiny_model("llama")).models[1]
    runner, size = ModelRunner(middle, Sampler(199)), middle.hidden_size
    sessions = {
        name: (NodeSession(SessionTerms(1, 40, 8, 100, 199, 4 * size)), middle.store.open(40, 8))
        for name in ("bad", "good")
    }

    def segment(name: str, seq: int, value: float) -> Segment:
        session, kv = sessions[name]
        append = append_of(seq, 1 + 2 * seq, [2 * seq, 2 * seq + 1], [5, 6], prefill=True)
        rows = np.full((2, size), value, np.float32).tobytes()
        (step,) = session.receive(replace(append, hidden=rows))
        return Segment(kv, step, middle.loaded.span)

    first, second, good = runner.run([segment("bad", 0, np.nan), segment("bad", 1, 0.1), segment("good", 0, 0.1)])
    third, again = runner.run([segment("bad", 2, 0.1), segment("good", 1, 0.1)])
    assert [computed.error is None for computed in (first, second, third, good, again)] == [False] * 3 + [True] * 2
