"""Provide tiny models of every supported family, and chains of their spans in one process."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from treeswarm.protocol.messages import Answers, Append
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.base import Attention, TorchReference
from treeswarm_node.attention.flash import FlashAttention
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.attention.sdpa import SdpaAttention
from treeswarm_node.kv_cache.kv_store import SessionKV
from treeswarm_node.kv_cache.page_pool import PAGE
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.span_model import SpanModel

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WINDOW = 24


def _long_rope() -> dict[str, Any]:
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i / 2 for i in range(8)]}
    return {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
            "factor": 16.0,
            **factors,
        },
    }


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    "phi3": ("phi3", _long_rope()),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a random model of the family."""
    model_type, family_config = FAMILIES[family]
    return random_model(model_type, **{**SMALL, **family_config, **changes})


def random_model(model_type: str, **config: Any) -> PreTrainedModel:
    """Return a random model of the type, with weights and buffers large enough that mistakes change the output."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **config), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    saved = model.state_dict()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.data += torch.rand_like(buffer) * 0.3
    return model.requires_grad_(False)


@dataclass
class SpanChain:
    """Runs a model in three spans with a KV cache each, without any network."""

    models: list[SpanModel]
    sessions: dict[str, tuple[NodeSession, list[SessionKV]]] = field(default_factory=dict)

    def open(self, name: str, trunk_room: int, crown_room: int = 32, *, shared_with: str | None = None) -> None:
        """Open a session, whose trunk may begin with the first page of another one's."""
        vocab = int(self.models[0].loaded.config.vocab_size)
        pages = (
            [[kv.trunk_pages[0]] for kv in self.sessions[shared_with][1]] if shared_with else [[]] * len(self.models)
        )
        terms = SessionTerms(1, trunk_room, crown_room, 10_000, vocab, 0, offered=PAGE if shared_with else 0)
        caches = [model.store.open(trunk_room, crown_room, own) for model, own in zip(self.models, pages, strict=True)]
        self.sessions[name] = (NodeSession(terms), caches)

    def run(self, appends: dict[str, Append]) -> dict[str, torch.Tensor]:
        """Send one batch through the chain, and return the logits of every row, by session."""
        steps = {name: self.sessions[name][0].receive(append)[0] for name, append in appends.items()}
        tokens = np.concatenate([step.tokens for step in steps.values()])
        positions = np.concatenate([step.positions for step in steps.values()])
        hidden = self.models[0].embed(torch.from_numpy(tokens), torch.from_numpy(positions))
        for i, model in enumerate(self.models):
            segments = [Segment(self.sessions[name][1][i], step, model.loaded.span) for name, step in steps.items()]
            hidden = model.forward(segments, hidden)
        logits = self.models[-1].logits(hidden)
        return dict(zip(steps, logits.split([step.rows for step in steps.values()]), strict=True))


CPU = torch.device("cpu")
ADAPTERS: dict[str, Callable[[], Attention]] = {
    "torch": TorchReference,
    "sdpa": SdpaAttention,
    "flash": lambda: FlashAttention(CPU),
}


@pytest.fixture
def adapter() -> Attention:
    """Return the attention adapter of spans.  Test files that cover every adapter override this fixture."""
    return TorchReference()


@pytest.fixture
def cut_in_three(adapter: Attention) -> Callable[[PreTrainedModel], SpanChain]:
    """Return a function that cuts a model into blocks 0:1, 1:3 and 3:4, each with a copy of the model."""

    def cut(model: PreTrainedModel) -> SpanChain:
        spans = [Span(0, 1), Span(1, 3), Span(3, 4)]
        loaded = [LoadedSpan(copy.deepcopy(model), span, torch.float32, CPU) for span in spans]
        return SpanChain([SpanModel(span, 2048, adapter) for span in loaded])

    return cut


def append_of(
    seq: int,
    first_id: int,
    parents: Sequence[int],
    tokens: Sequence[int],
    *,
    commit: Sequence[int] = (),
    prefill: bool = False,
) -> Append:
    """Return an append that requests an answer for every row."""
    return Append(
        epoch=1,
        seq=seq,
        commit=np.array(commit, np.uint32),
        first_id=first_id,
        parents=np.array(parents, np.uint32),
        tokens=np.array(tokens, np.uint32),
        prefill=prefill,
        answers=Answers.ALL,
        settings=SamplingSettings(),
        skipped=np.zeros(len(tokens), np.bool_),
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, because tests run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
