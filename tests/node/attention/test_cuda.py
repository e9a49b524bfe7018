"""Flash attention on a CUDA device agrees with the reference.

Run `pytest tests/node/attention/test_cuda.py` on a machine with such a device.
"""

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
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.attention_selection import choose_attention
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.span_model import SpanModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
KernelResult = tuple[torch.Tensor, torch.Tensor]
# More rows than one append of a replay has.
SPAN, ROWS = Span(0, 2), 700


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [KVShape(8, 128, 128), KVShape(2, 64, 64), KVShape(1, 256, 256), KVShape(4, 80, 80)])
def test_flash_kernel_agrees_with_the_reference(shape: KVShape, dtype: torch.dtype) -> None:
    key_counts: list[int] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> KernelResult:
        key_counts.append(key.shape[1])
        return flash_kernel(query, key, value, scaling)

    device = torch.device("cuda")
    difference = measure_disagreement(FlashAttention(device, kernel), 4 * shape.kv_heads, shape, dtype, device)
    assert difference < TOLERANCES[dtype]
    assert key_counts


def test_auto_uses_flash_and_agrees_with_the_cpu() -> None:
    (name, output), (_, expected) = (
        _outputs(torch.device("cuda"), torch.bfloat16),
        _outputs(torch.device("cpu"), torch.float32),
    )
    assert name == "torch-flash"
    assert float((output - expected).norm() / expected.norm()) < 0.03


@torch.inference_mode()
def _outputs(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """Return the adapter's name, and a long prompt's activations, computed in chunks that each see a trunk."""
    model = SpanModel(load_span(resolve_model("demo"), SPAN, dtype, device), kv_tokens=1024)
    choose_attention(model, "auto")
    vocab = model.loaded.config.vocab_size
    outputs = []
    kv = model.store.open(ROWS, 1)
    session = NodeSession(SessionTerms(0, ROWS, 1, 0, vocab, 0, Resumption(ROWS, ROWS)))
    for append in replay(0, list(range(ROWS))):
        (step,) = session.receive(append)
        tokens, positions = (torch.from_numpy(rows).to(device) for rows in (step.tokens, step.positions))
        hidden = model.embed(tokens, positions)
        outputs.append(model.forward([Segment(kv, step, SPAN)], hidden).float().cpu())
    return model.attention_name, torch.cat(outputs)
