"""Check which numerics a device computes correctly, with one block of the bundled model."""

from dataclasses import dataclass

import torch

from treeswarm.errors import SwarmError
from treeswarm.model_files import resolve_model
from treeswarm.protocol.messages import Resumption
from treeswarm.protocol.spans import Span
from treeswarm.session.replay import replay
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.quantization.weight_kinds import check_kind
from treeswarm_node.model.span_model import SpanModel

ROWS = 48
BLOCK = Span(0, 1)
# Largest accepted error by dtype and quantization, relative to the output's norm.  Seen on a CPU (2026-11-21): float32
# 0, bfloat16 0.0044, float16 0.0005, int8 0.0070, nf4 0.094; a kernel that is wrong has an error of about 1.
TOLERANCES = {
    ("float32", "none"): 1e-4,
    ("bfloat16", "none"): 0.03,
    ("float16", "none"): 0.01,
    ("float32", "int8"): 0.05,
    ("float32", "int4"): 0.3,
    ("float32", "nf4"): 0.3,
}


@dataclass(frozen=True)
class NumericsCheck:
    """Holds the result of checking one dtype and quantization on one device."""

    dtype: str
    quantization: str
    error: float | None
    """Error relative to the output's norm, or None if the block did not run."""
    reason: str = ""
    """Why the block did not run."""

    @property
    def name(self) -> str:
        """Name for users."""
        return self.dtype if self.quantization == "none" else f"{self.quantization} weights"

    @property
    def passes(self) -> bool:
        """Whether the error is tolerable; False if it is not finite."""
        return self.error is not None and self.error <= TOLERANCES[self.dtype, self.quantization]


def check_numerics(device: torch.device) -> list[NumericsCheck]:
    """Compare each dtype and quantization of `TOLERANCES` with float32 on the CPU, which takes some seconds."""
    reference = _compute_output(torch.device("cpu"), "float32", "none")
    return [_check(device, dtype, quantization, reference) for dtype, quantization in TOLERANCES]


def _check(device: torch.device, dtype: str, quantization: str, reference: torch.Tensor) -> NumericsCheck:
    try:
        check_kind(quantization, device)
        error = float((_compute_output(device, dtype, quantization) - reference).norm() / reference.norm())
    except (SwarmError, RuntimeError) as failure:
        return NumericsCheck(dtype, quantization, None, str(failure).splitlines()[0])
    return NumericsCheck(dtype, quantization, error)


@torch.inference_mode()
def _compute_output(device: torch.device, dtype: str, quantization: str) -> torch.Tensor:
    """Return the block's activations of a prompt, float32 [ROWS, hidden] on the CPU."""
    loaded = load_span(resolve_model("demo"), BLOCK, getattr(torch, dtype), device, quantization=quantization)
    model = SpanModel(loaded, kv_tokens=4 * ROWS)
    check_family(model)
    terms = SessionTerms(0, ROWS, 1, 0, loaded.config.vocab_size, 0, Resumption(ROWS, ROWS))
    session, kv = NodeSession(terms), model.store.open(ROWS, 1)
    tokens = list(range(ROWS))
    (append,) = replay(0, tokens)
    (step,) = session.receive(append)
    hidden = model.embed(torch.tensor(tokens, device=device), torch.arange(ROWS, device=device))
    return model.forward([Segment(kv, step, BLOCK)], hidden).float().cpu()
