"""The MTP layer of a checkpoint guesses what transformers' own MtpModel guesses, and goes on below its guesses."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.node.conftest import CPU, random_model, tiny_model
from transformers import PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from treeswarm.errors import ModelError
from treeswarm.model_files import DEFAULT_HUB
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.loaded_span import LoadedSpan, ServedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator.finding import find_speculator
from treeswarm_node.speculator.loading import load_speculator
from treeswarm_node.speculator.mtp import MtpSpeculator
from treeswarm_node.speculator.mtp_loading import load_mtp
from treeswarm_node.speculator.seam import SpeculationRequest
from treeswarm_node.speculator.self_check import CheckedSpeculator

BLOCKS, ROWS = 3, 9
SIZES: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
TARGETS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"num_key_value_heads": 2, "head_dim": 16},
    "deepseek_v3": LATENT,
}
TOLERANCE = 1e-5


class Target:
    """A tiny model whose checkpoint has an MTP layer, and transformers' own module with the same weights."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.model: Any = random_model(model_type, **{**SIZES, **TARGETS[model_type]})
        self.stock: Any = MtpModel(self.model, 1).eval().requires_grad_(False)
        torch.manual_seed(1)
        for parameter in self.stock.layers.parameters():
            parameter.data.normal_(0, 0.15) if parameter.ndim > 1 else parameter.data.add_(torch.rand_like(parameter))
        for buffer in self.stock.layers.buffers():  # corrections of the experts' scores
            buffer.data += torch.rand_like(buffer)
        self.folder = folder
        self.model.save_pretrained(folder)
        self.add_layer(checkpoint_tensors(self.stock))

    def add_layer(self, tensors: dict[str, torch.Tensor]) -> None:
        path = self.folder / "model.safetensors"
        save_file(load_file(path) | tensors, path, {"format": "pt"})

    def load(self) -> MtpSpeculator:
        span = SpanModel(LoadedSpan(copy.deepcopy(self.model), Span(0, BLOCKS), torch.float32, CPU), 256)
        served = ServedSpan(Span(0, BLOCKS), BLOCKS, 199, 64, 512, "c", NumericsClass("w", "float32"), "", 256)
        return load_mtp(self.folder, span, served, lambda: self.model.get_input_embeddings().weight.data)


def checkpoint_tensors(stock: Any) -> dict[str, torch.Tensor]:
    """Return the layer's tensors as published checkpoints name them: as one more block, and expert by expert."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stock.layers[0].state_dict().items():
        place = f"model.layers.{BLOCKS}.{name.removeprefix('mtp_block.')}".replace("post_norm", "shared_head.norm")
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(tensor):
                for part, matrix in zip(("gate", "up"), expert.chunk(2), strict=True):
                    tensors[place.replace("gate_up_proj", f"{i}.{part}_proj.weight")] = matrix.clone()
        elif name.endswith("experts.down_proj"):
            for i, expert in enumerate(tensor):
                tensors[place.replace("down_proj", f"{i}.down_proj.weight")] = expert.clone()
        else:
            tensors[place] = tensor.clone()
    embedding = stock.embed_tokens.weight.clone()
    return tensors | {f"model.layers.{BLOCKS}.{end}": embedding.clone() for end in (
        "embed_tokens.weight", "shared_head.head.weight")}  # fmt: skip


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    return Target(request.param, tmp_path)


def tokens_of(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).integers(0, 199, count))


def last_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the last block returns, before the final norm, [rows, hidden]."""
    modules: Any = model
    kept: list[torch.Tensor] = []
    hook = modules.get_decoder().layers[-1].register_forward_hook(lambda _, __, result: kept.append(result))
    with torch.no_grad():
        model(input_ids=tokens[None])
    hook.remove()
    return kept[0][0]


def read(speculator: MtpSpeculator, memory: Any, states: torch.Tensor, tokens: torch.Tensor, start: int) -> Any:
    asked = SpeculationRequest(memory, start, states[start:], tokens[start + 1 :].numpy(), SamplingSettings(), 40)
    memory.cut(start)
    return speculator._read(memory, asked), asked


@torch.inference_mode()
def test_a_layer_computes_what_transformers_computes(target: Target) -> None:
    speculator, tokens = target.load(), tokens_of(ROWS + 1)
    normed = target.model.get_decoder()(input_ids=tokens[None, :-1]).last_hidden_state
    cache = MtpCache(config=target.model.config.get_mtp_config())
    positions = torch.arange(1, ROWS + 1)[None]
    expected = target.stock.forward_layer(0, normed, positions, cache, input_ids=tokens[None, 1:])
    memory = speculator.new_memory()
    result, asked = read(speculator, memory, last_states(target.model, tokens[:-1]), tokens, 0)
    assert torch.allclose(result, expected[0], atol=TOLERANCE)
    # Below the root the layer takes its own result and its own guess.
    guess = target.model.lm_head(expected[:, -1:]).argmax(-1)
    below = target.stock.forward_layer(0, expected[:, -1:], positions[:, -1:] + 1, cache, input_ids=guess)
    scores = torch.log_softmax(target.model.lm_head(below)[0, 0], -1)
    memory.cut(0)
    *_, tree = speculator.propose(asked)
    node = next(i for i in range(len(tree)) if tree.parents[i] == 0)
    assert tree.tokens[0] == guess.item()
    first = torch.log_softmax(target.model.lm_head(expected)[0, -1], -1).max()
    assert float(tree.scores[0]) == pytest.approx(float(first), abs=1e-4)
    assert float(tree.scores[node]) == pytest.approx(float(first + scores[tree.tokens[node]]), abs=1e-4)


@torch.inference_mode()
def test_rows_read_in_parts_and_after_a_tree_give_the_same(target: Target) -> None:
    speculator, tokens = target.load(), tokens_of(ROWS + 1)
    states = last_states(target.model, tokens[:-1])
    whole, _ = read(speculator, speculator.new_memory(), states, tokens, 0)
    memory = speculator.new_memory()
    first = SpeculationRequest(memory, 0, states[:5], tokens[1:6].numpy(), SamplingSettings(), 20)
    for _ in speculator.propose(first):
        pass
    part, _ = read(speculator, memory, states, tokens, 4)
    assert torch.allclose(part, whole[4:], atol=TOLERANCE)
    gap, _ = read(speculator, memory, states[:-1], tokens[:-1], ROWS - 2)
    alone, _ = read(speculator, speculator.new_memory(), states[:-1], tokens[:-1], ROWS - 2)
    assert not torch.allclose(gap, alone, atol=1e-3)
    assert memory.rows == ROWS - 1


@torch.inference_mode()
def test_a_window_forgets_what_is_far_away(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MtpSpeculator, "window", 4)
    speculator, tokens = target.load(), tokens_of(ROWS + 1)
    states = last_states(target.model, tokens[:-1])
    whole, _ = read(speculator, speculator.new_memory(), states, tokens, 0)
    memory = speculator.new_memory()
    read(speculator, memory, states[:6], tokens[:7], 0)
    assert (memory.start, memory.rows) == (2, 4)
    part, _ = read(speculator, memory, states, tokens, 6)
    assert torch.allclose(part, whole[6:], atol=TOLERANCE)


def test_a_checkpoint_without_a_whole_layer_is_refused(tmp_path: Path) -> None:
    target = Target("glm4_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    without = {name: t for name, t in tensors.items() if not name.endswith("eh_proj.weight")}
    save_file(without, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks or adds layers\.0\.eh_proj\.weight"):
        target.load()
    save_file({name: t for name, t in tensors.items() if f"layers.{BLOCKS}." not in name}, path, {"format": "pt"})
    with pytest.raises(ModelError, match="has no MTP layer: give a head"):
        target.load()


def test_a_tail_loads_the_layer_of_its_checkpoint(target: Target) -> None:
    """A node of the last block alone reads the embedding from the files, and `auto` takes the layer."""
    loaded = load_span(target.folder, Span(2, BLOCKS), torch.float32, CPU)
    span = SpanModel(loaded, 256)
    served = ServedSpan(Span(2, BLOCKS), BLOCKS, 199, 64, 512, "c", NumericsClass("w", "float32"), "", 256)
    for choice in ("mtp", "auto"):
        speculator = load_speculator(choice, span, target.folder, served)
        assert isinstance(speculator, CheckedSpeculator)
        assert (speculator.name, speculator.taps) == ("mtp", (BLOCKS - 1,))
        assert isinstance(speculator.inner, MtpSpeculator)
        assert torch.equal(speculator.inner.embedding, target.model.get_input_embeddings().weight)
    found = find_speculator("auto", target.folder, DEFAULT_HUB)
    assert found is not None
    layer = sum(tensor.numel() for tensor in target.stock.layers.state_dict().values())
    assert found.memory_bytes(4, 4) == 4 * (layer + 199 * 64)


def test_a_model_without_such_layers_says_so(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    span = SpanModel(LoadedSpan(copy.deepcopy(model), Span(0, 4), torch.float32, CPU), 256)
    served = ServedSpan(Span(0, 4), 4, 199, 64, 512, "c", NumericsClass("w", "float32"), "", 256)
    with pytest.raises(ModelError, match="transformers knows no MTP layer of models of type 'llama'"):
        load_speculator("mtp", span, tmp_path, served)
    assert load_speculator("auto", span, tmp_path, served) is None
