"""Heads in both public formats compute what a second implementation computes, bit for bit; no trap is ignored."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.node.conftest import CPU, SMALL, append_of, random_model
from tests.support.eagle3_heads import FLAT, NESTED, HeadFiles, PlainHead
from transformers import PreTrainedModel

from treeswarm.errors import ModelError
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.engine.model_runner import ModelRunner
from treeswarm_node.engine.sampler import Sampler
from treeswarm_node.model.loaded_span import LoadedSpan, ServedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator
from treeswarm_node.speculator.eagle3.config import read_eagle3_config
from treeswarm_node.speculator.eagle3.loading import HeadTarget, load_eagle3
from treeswarm_node.speculator.head import HeadShape, SpeculatorHead
from treeswarm_node.speculator.loading import load_speculator
from treeswarm_node.speculator.seam import SpeculationRequest

BLOCKS, ROWS = 8, 11
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
}
NAMES = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "gpt_oss": "GptOss"}
FORMS = (FLAT, NESTED)
TAPS = (1, 3, 4)  # the default ids 2, n / 2 and n - 3 of 8 blocks, less one for the embedding


def target_model(model_type: str) -> PreTrainedModel:
    model = random_model(model_type, **(SMALL | {"num_hidden_layers": BLOCKS} | TARGETS[model_type]))
    model.config.architectures = [f"{NAMES[model_type]}ForCausalLM"]
    return model


def text() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 199, ROWS + 1))


def stock_states(model: PreTrainedModel, tokens: torch.Tensor, blocks: tuple[int, ...] = TAPS) -> torch.Tensor:
    """Return what stock blocks return, [rows, taps · hidden]."""
    with torch.no_grad():
        hidden = model(input_ids=tokens[None], output_hidden_states=True).hidden_states
    return torch.cat([hidden[block + 1][0] for block in blocks], -1)


def head_target(model: PreTrainedModel, **changes: Any) -> HeadTarget:
    modules: Any = model
    target = HeadTarget(
        name="org/model",
        architectures=tuple(model.config.architectures or ()),
        blocks=BLOCKS,
        hidden_size=64,
        lm_head=modules.get_output_embeddings().weight.data,
        read_embedding=lambda: modules.get_input_embeddings().weight.data,
        dtype=torch.float32,
    )
    return replace(target, **changes)


def load(folder: Path, model: PreTrainedModel, **changes: Any) -> AutoregressiveSpeculator:
    return load_eagle3(folder, head_target(model, **changes), torch.float32)


def request(speculator: AutoregressiveSpeculator, states: torch.Tensor, tokens: torch.Tensor) -> SpeculationRequest:
    return SpeculationRequest(speculator.new_memory(), 0, states, tokens[1:].numpy(), SamplingSettings(), 40)


@torch.inference_mode()
def differences(folder: Path, model: PreTrainedModel, speculator: AutoregressiveSpeculator) -> list[str]:
    """Return the steps at which a speculator's bits are not those of the second implementation."""
    tokens, plain = text(), PlainHead(folder, model.get_input_embeddings().weight.data)  # type: ignore[union-attr]
    states = stock_states(model, tokens[:-1], speculator.taps)
    asked = request(speculator, states, tokens)
    own, second = speculator._read(asked.memory, asked), plain.rows(plain.fuse(states), tokens[1:], 0)
    logits, expected = speculator.head.logits(own, speculator.weights.lm_head), plain.logits(second)
    found = [] if torch.equal(own, second) and torch.equal(logits, expected) else ["the text's rows"]
    if speculator.weights.vocabulary.tolist() != plain.target_ids():
        found.append("the vocabulary")
    # Below the root, the head goes on from its own result and its own guess.
    guess = int(plain.target_ids()[int(expected[-1].argmax())])
    embedded = speculator.weights.embed(np.array([guess]))
    query, key, value = speculator.head.attention_inputs(own[-1:][None], embedded, torch.tensor([ROWS]))
    keys, values = torch.cat([asked.memory.keys, key[0]], 1), torch.cat([asked.memory.values, value[0]], 1)
    mask = torch.ones(1, ROWS + 1, dtype=torch.bool)
    below = speculator.head.result(own[-1:][None], query, keys[None], values[None], mask)[0]
    if not torch.equal(below, plain.rows(second[-1:], torch.tensor([guess]), ROWS)):
        found.append("the row below the root")
    return found


# ---------------------------------------------------------------- both formats, for every family


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", TARGETS)
def test_both_formats_compute_what_a_second_implementation_computes(model_type: str, form: str, tmp_path: Path) -> None:
    model = target_model(model_type)
    files = HeadFiles(architectures=(f"{NAMES[model_type]}ForCausalLM",))
    speculator = load(files.write(tmp_path, form), model)
    assert speculator.name == "eagle3"
    assert speculator.taps == TAPS
    assert differences(tmp_path, model, speculator) == []


@pytest.mark.parametrize("model_type", TARGETS)
def test_a_node_taps_the_states_that_a_head_was_trained_on(model_type: str, tmp_path: Path) -> None:
    """What the node's own blocks return at the head's taps are stock transformers' hidden states."""
    model = target_model(model_type)
    expected = stock_states(model, text()[:-1])
    span = SpanModel(LoadedSpan(copy.deepcopy(model), Span(0, BLOCKS), torch.float32, CPU), 2048)
    files = HeadFiles(architectures=(f"{NAMES[model_type]}ForCausalLM",))
    speculator = load_speculator(str(files.write(tmp_path, NESTED)), span, tmp_path, served(span))
    assert speculator is not None
    tokens, rows = text()[:-1], ROWS
    session = NodeSession(SessionTerms(1, rows, 8, rows + 8, 199, 0))
    (step,) = session.receive(append_of(0, 1, range(rows), tokens.tolist(), prefill=True))
    runner = ModelRunner(span, Sampler(199), taps=speculator.taps)
    (computed,) = runner.run([Segment(span.store.open(rows, 8), step, span.loaded.span, True)])
    assert computed.states is not None
    assert torch.allclose(computed.states, expected, atol=1e-4, rtol=1e-4)


def served(model: SpanModel) -> ServedSpan:
    numerics = NumericsClass("w", "float32")
    return ServedSpan(model.loaded.span, BLOCKS, 199, 64, 512, "c", numerics, "", 256)


# ---------------------------------------------------------------- traps, each of which fails if it is ignored


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return target_model("llama")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
def test_each_norm_is_where_the_config_says(flag: str, form: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    speculator = load(HeadFiles().with_flags(flag).write(tmp_path, form), llama)
    assert differences(tmp_path, llama, speculator) == []
    # A head that ignores the flag computes something else.
    without = SpeculatorHead(speculator.head.shape, replace(speculator.head.recipe, **{flag: False})) if flag in {
        "norm_before_residual", "norm_output"} else None  # fmt: skip
    if without is not None:
        without.load_state_dict(speculator.head.state_dict())
        ignoring = AutoregressiveSpeculator(speculator.config, without, speculator.weights)
        assert "the row below the root" in differences(tmp_path, llama, ignoring)


@pytest.mark.parametrize("flag", ["norm_before_fc", "fc_norm"])
def test_a_norm_that_the_config_does_not_name_is_refused(flag: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    HeadFiles().write(tmp_path, FLAT, HeadFiles().with_flags(flag).tensors())
    with pytest.raises(ModelError, match=f"has the norm of {flag}, and its config does not say so"):
        load(tmp_path, llama)
    HeadFiles().with_flags(flag).write(tmp_path, FLAT, HeadFiles().tensors())
    with pytest.raises(ModelError, match=r"the weights in .* are not those of its config"):
        load(tmp_path, llama)


def test_flags_in_eagle_config_count_as_well(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = HeadFiles().with_flags("norm_before_fc").write(tmp_path, FLAT)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["eagle_config"] = {"norm_before_fc": config.pop("norm_before_fc")}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert differences(folder, llama, load(folder, llama)) == []


@pytest.mark.parametrize(
    ("form", "ids", "blocks", "expected"),
    [
        (FLAT, None, 36, (1, 17, 32)),
        (NESTED, None, 36, (1, 17, 32)),
        (FLAT, [2, 18, 33], 36, (1, 17, 32)),
        (NESTED, [2, 18, 33], 36, (1, 17, 32)),
        # SpecForge counts blocks.
        (FLAT, [1, 17, 32], 36, (1, 17, 32)),
        (FLAT, [1, 46, 90], 94, (1, 46, 90)),
        (FLAT, [1, 17, 33], 36, (1, 17, 33)),
        # The same ids, copied from a flat head.
        (NESTED, [1, 46, 90], 94, (1, 46, 90)),
        (NESTED, [1, 17, 33], 36, (0, 16, 32)),
        # The last state, before the final norm.
        (FLAT, [24, 30, 36], 36, (23, 29, 35)),
        (FLAT, [1, 18, 36], 36, (0, 17, 35)),
        # Engines collect states in the order of the layers.
        (NESTED, [33, 2, 18], 36, (1, 17, 32)),
        (NESTED, [2, 10, 18, 26, 34], 36, (1, 9, 17, 25, 33)),
    ],
)
def test_layer_ids_count_the_embedding_or_not(
    form: str, ids: list[int] | None, blocks: int, expected: tuple[int, ...]
) -> None:
    files = HeadFiles(tap_ids=ids)
    assert read_eagle3_config(files.config(form)).tapped_blocks(blocks) == expected


@pytest.mark.parametrize(("ids", "blocks"), [([0, 3, 5], 8), ([2, 4, 9], 8), ([2, 2, 4], 8), (None, 3)])
def test_layers_that_a_model_does_not_have_are_refused(ids: list[int] | None, blocks: int) -> None:
    with pytest.raises(ModelError, match=f"this model has {blocks} blocks: the head is for another model"):
        read_eagle3_config(HeadFiles(tap_ids=ids).config(NESTED)).tapped_blocks(blocks)


@pytest.mark.parametrize("form", FORMS)
def test_guesses_are_the_targets_tokens(form: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    """Token i of the head is token i + d2t[i] of the target."""
    speculator = load(HeadFiles().write(tmp_path, form), llama)
    chosen = set(torch.arange(199)[load_file(tmp_path / "model.safetensors")["t2d"]].tolist())
    tokens = text()
    *_, tree = speculator.propose(request(speculator, stock_states(llama, tokens[:-1]), tokens))
    assert len(tree) > 3
    assert set(tree.tokens.tolist()) <= chosen
    assert set(speculator.weights.vocabulary.tolist()) == chosen


def test_a_whole_vocabulary_needs_no_table(llama: PreTrainedModel, tmp_path: Path) -> None:
    files = HeadFiles(draft_vocab=199)
    speculator = load(files.write(tmp_path, FLAT), llama)
    assert speculator.weights.vocabulary.tolist() == list(range(199))
    assert differences(tmp_path, llama, speculator) == []
    unfilled = {"d2t": torch.zeros(199, dtype=torch.int64), "t2d": torch.zeros(199, dtype=torch.bool)}
    speculator = load(files.write(tmp_path / "unfilled", NESTED, files.tensors() | unfilled), llama)
    assert speculator.weights.vocabulary.tolist() == list(range(199))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("d2t"), "lacks d2t, which says which"),
        (lambda t: t.update(d2t=t["d2t"] + 1), "choose different tokens|outside the vocabulary"),
        (lambda t: t.update(d2t=t["d2t"] + torch.arange(50)), "choose different tokens|outside the vocabulary"),
        (lambda t: t.update(d2t=-torch.arange(50)), "names tokens twice"),
        (lambda t: t.update({"layers.0.mlp.gate_proj.weight_scale": torch.ones(1)}), "is no part of a head"),
        (lambda t: t.update({"layers.1.hidden_norm.weight": torch.ones(64)}), "is no part of a head"),
        (lambda t: t.pop("norm.weight"), "are not those of its config"),
        (lambda t: t.update({"lm_head.weight": torch.ones(51, 64)}), "scores 51 tokens, its vocabulary has 50"),
    ],
)
def test_tensors_that_contradict_are_refused(change: Any, problem: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    tensors = HeadFiles().tensors()
    change(tensors)
    with pytest.raises(ModelError, match=problem):
        load(HeadFiles().write(tmp_path, NESTED, tensors), llama)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_may_have_its_own_embedding_and_hidden_size(form: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    files = HeadFiles(hidden=32, heads=2, own_embedding=True, intermediate=48)
    speculator = load(files.write(tmp_path, form), llama)
    assert differences(tmp_path, llama, speculator) == []
    with pytest.raises(ModelError, match="computes with 32 values per state and has no embedding or LM head of its"):
        load(replace(files, own_embedding=False).write(tmp_path / "without", form), llama)


def test_a_head_without_an_lm_head_uses_the_targets_rows(llama: PreTrainedModel, tmp_path: Path) -> None:
    tensors = HeadFiles().tensors()
    del tensors["lm_head.weight"]
    speculator = load(HeadFiles().write(tmp_path, NESTED, tensors), llama)
    rows = llama.get_output_embeddings().weight[speculator.weights.vocabulary]  # type: ignore[union-attr]
    assert torch.equal(speculator.weights.lm_head, rows)


def test_a_layer_of_qwen3_norms_queries_and_keys(llama: PreTrainedModel, tmp_path: Path) -> None:
    speculator = load(HeadFiles(layer_type="qwen3").write(tmp_path, NESTED), llama)
    assert differences(tmp_path, llama, speculator) == []


def test_the_window_is_the_layers_own_or_what_it_was_trained_on() -> None:
    sliding = {"sliding_window": 24, "use_sliding_window": True, "layer_types": ["sliding_attention"]}
    assert read_eagle3_config(HeadFiles().config(NESTED)).window == 512
    assert read_eagle3_config(HeadFiles(layer=sliding).config(NESTED)).window == 24
    # A flat config copies the target's fields; its layer attends to everything.
    assert read_eagle3_config(HeadFiles(layer=sliding).config(FLAT)).window == 512
    assert read_eagle3_config(HeadFiles(layer={"max_position_embeddings": 1 << 17}).config(FLAT)).window == 2048


def test_a_head_of_the_trainer_can_be_published(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Heads that are trained here norm each tap without weights, which is `fc_norm` with weights of one."""
    torch.manual_seed(5)
    trained = SpeculatorHead(HeadShape(64, 3, 4, 2, 16, 96, window=512))
    for parameter in trained.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    own = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    published = {
        "fc.weight": own.pop("fuse.weight"),
        "norm.weight": own.pop("result_norm.weight"),
        "lm_head.weight": llama.get_output_embeddings().weight.data.clone(),  # type: ignore[union-attr]
        "layers.0.input_layernorm.weight": own.pop("token_norm.weight"),
        "layers.0.hidden_norm.weight": own.pop("state_norm.weight"),
        "layers.0.post_attention_layernorm.weight": own.pop("mlp_norm.weight"),
        **{f"fc_norm.{i}.weight": torch.ones(64) for i in range(3)},
    }
    published |= {
        f"layers.0.{name}" if name.startswith("mlp") else f"layers.0.self_attn.{name}": tensor
        for name, tensor in own.items()
    }
    files = HeadFiles(draft_vocab=199, epsilon=1e-6).with_flags("fc_norm")
    tokens = text()
    states = stock_states(llama, tokens[:-1])
    trees = []
    for form in FORMS:
        speculator = load(files.write(tmp_path / form, form, published), llama)
        assert differences(tmp_path / form, llama, speculator) == []
        trees.append([*speculator.propose(request(speculator, states, tokens))][-1])
    here = AutoregressiveSpeculator(speculator.config, trained, speculator.weights)
    *_, expected = here.propose(request(here, states, tokens))
    for tree in trees:
        assert tree.tokens.tolist() == expected.tokens.tolist()
        assert tree.scores.tolist() == pytest.approx(expected.scores.tolist(), abs=1e-4)


# ---------------------------------------------------------------- refusals by name


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 2}, "the head has 2 layers: only heads of one layer are read"),
        ({"model_type": "deepseek_v3"}, "the head's layer is of type 'deepseek_v3': known are llama and qwen3"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "embedding is of type 'dyn"),
        ({"fc_norm": True, "norm_before_fc": True}, "which exclude each other"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "reads the model's last state alone"),
        ({"num_key_value_heads": 3}, "describes no head that can be built"),
    ],
)
def test_heads_that_compute_otherwise_are_refused(change: dict[str, Any], problem: str) -> None:
    content = HeadFiles().config(FLAT)
    if "rope_parameters" in change:
        del content["rope_theta"]
    with pytest.raises(ModelError, match=problem):
        read_eagle3_config(content | change)


def test_other_kinds_of_speculators_are_named(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = HeadFiles().write(tmp_path, NESTED)
    content = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(content | {"speculators_model_type": "dflash"}), "utf-8")
    with pytest.raises(ModelError, match="holds no EAGLE-3 head but 'dflash'"):
        load(folder, llama)


def test_weights_that_would_have_to_be_unpickled_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = HeadFiles().write(tmp_path, FLAT)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has its weights as \.bin files, which are never loaded"):
        load(folder, llama)


def test_a_head_of_another_model_is_refused(
    llama: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelError, match=r"a model of 200 tokens and 64 values per state, this one has 199 and 64"):
        load(HeadFiles(vocab=200).write(tmp_path / "a", FLAT), llama)
    with pytest.raises(ModelError, match=r"a model of 199 tokens and 32 values per state, this one has 199 and 64"):
        load(HeadFiles(target_hidden=32).write(tmp_path / "b", FLAT), llama)
    with pytest.raises(ModelError, match="is for a Qwen3ForCausalLM, this model is a LlamaForCausalLM"):
        load(HeadFiles(architectures=("Qwen3ForCausalLM",)).write(tmp_path / "c", NESTED), llama)
    with caplog.at_level(logging.WARNING):
        load(HeadFiles(verifier="org/Model").write(tmp_path / "d", NESTED), llama)
        assert not caplog.text
        load(HeadFiles(verifier="org/other").write(tmp_path / "e", NESTED), llama)
    assert "was made for org/other: it may guess worse for org/model" in caplog.text


def test_a_damaged_file_is_named(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = HeadFiles().write(tmp_path, FLAT)
    save_file({}, folder / "other.safetensors")
    (folder / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ModelError, match=r"model\.safetensors is corrupt"):
        load(folder, llama)
