"""What a node's taps record is what the blocks of stock transformers return."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.node.conftest import SpanChain, append_of, tiny_model
from transformers import PreTrainedModel

from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_bench.speculators.target import TappedTarget
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.engine.model_runner import ModelRunner
from treeswarm_node.engine.sampler import Sampler
from treeswarm_node.model.span_model import SpanModel


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2"])
def test_taps_record_what_stock_blocks_return(
    cut_in_three: Callable[[PreTrainedModel], SpanChain], family: str
) -> None:
    model = tiny_model(family)
    target = TappedTarget(tiny_model(family), (1, 2))
    middle = cut_in_three(model).models[1]  # blocks 1:3
    tokens = torch.arange(7, 20)
    states, _ = target.read(tokens[None])
    hidden = TappedTarget(tiny_model(family), (0,)).read(tokens[None])[0][0]
    session_rows = len(tokens)
    runner = ModelRunner(middle, Sampler(199), taps=(1, 2))
    segments = [segment(middle, hidden, tokens, speculates=speculates) for speculates in (True, False)]
    tapped, untapped = runner.run(segments)
    assert untapped.states is None
    assert tapped.states is not None
    assert tapped.states.shape == (session_rows, 2 * middle.hidden_size)
    assert torch.allclose(tapped.states, states[0], atol=1e-4)
    assert tapped.hidden == untapped.hidden


def segment(model: SpanModel, hidden: torch.Tensor, tokens: torch.Tensor, *, speculates: bool) -> Segment:
    """Return a prefill of the whole text for a span that begins with these activations."""
    rows = len(tokens)
    session = NodeSession(SessionTerms(1, rows, 8, rows + 8, 199, 4 * model.hidden_size))
    append = append_of(0, 1, range(rows), tokens.tolist(), prefill=True)
    (step,) = session.receive(replace(append, hidden=hidden.numpy().astype(np.float32).tobytes()))
    return Segment(model.store.open(rows, 8), step, model.loaded.span, speculates)
