"""What only a CUDA device can show: `pytest tests/node/attention/test_cuda.py` there."""

import pytest
import torch

from treeswarm.model_files import resolve_model
from treeswarm.protocol.messages import Resumption
from treeswarm.protocol.spans import Span
from treeswarm.session.replay import replay
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.adapter_check import TOLERANCES, measure_disagreement
from treeswarm_node.attention.flash import FlashAttention, flash_kernel
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.kv_cache.kv_store import KVShape
from treeswarm_node.model.attention_selection import choose_attention
from treeswarm_node.model.loader import load_span
from treeswarm_node.model.span_model import SpanModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
Parted = tuple[torch.Tensor, torch.Tensor]
# More than one forward of a replay takes.
SPAN, ROWS = Span(0, 2), 700


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [KVShape(8, 128, 128), KVShape(2, 64, 64), KVShape(1, 256, 256), KVShape(4, 80, 80)])
def test_the_kernel_agrees_with_the_reference(shape: KVShape, dtype: torch.dtype) -> None:
    asked: list[int] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Parted:
        asked.append(key.shape[1])
        return flash_kernel(query, key, value, scaling)

    device = torch.device("cuda")
    off = measure_disagreement(FlashAttention(device, kernel), 4 * shape.kv_heads, shape, dtype, device)
    assert off < TOLERANCES[dtype]
    assert asked


def test_a_span_takes_it_unasked_and_computes_as_a_processor_does() -> None:
    ours, plain = _outputs(torch.device("cuda"), torch.bfloat16), _outputs(torch.device("cpu"), torch.float32)
    assert ours[0] == "torch-flash"
    assert float((ours[1] - plain[1]).norm() / plain[1].norm()) < 0.03


@torch.inference_mode()
def _outputs(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """The adapter's name, and a long prompt's activations, in chunks that see a trunk each."""
    model = SpanModel(load_span(resolve_model("demo"), SPAN, dtype, device), kv_tokens=1024)
    choose_attention(model, "auto")
    vocab = model.loaded.config.vocab_size
    outputs = []
    kv = model.store.open(ROWS, 1)
    session = NodeSession(SessionTerms(0, ROWS, 1, 0, vocab, 0, Resumption(ROWS, ROWS)))
    for append in replay(0, list(range(ROWS))):
        (step,) = session.receive(append)
        hidden = model.embed(torch.from_numpy(step.tokens).to(device))
        outputs.append(model.forward([Segment(kv, step, SPAN)], hidden).float().cpu())
    return model.attention_name, torch.cat(outputs)
